"""A procedural pack of LIBERO models: primitive shapes with the bodies, joints, sites and names LIBERO expects.

It lets all 40 tasks of libero_spatial, libero_object, libero_goal and libero_10 (and libero_90's) load with
their official initial states where the published assets cannot be had. Images and contact details differ from
the published assets, so results on it are not comparable with published tables.
"""

from envs.standins.pack import build_pack, generator_digest, required_files

__all__ = ["build_pack", "generator_digest", "required_files"]
