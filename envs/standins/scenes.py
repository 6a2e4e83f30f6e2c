"""The five arenas: floor, walls, table, lights and cameras, with the names that LIBERO's arena classes look up."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass

from envs.standins.models import CONTACT, numbers
from envs.standins.shapes import Colour, Shape, block

TABLE_WOOD: Colour = (0.80, 0.71, 0.61)
COFFEE_TABLE: Colour = (0.33, 0.21, 0.16)
DESK: Colour = (0.57, 0.43, 0.27)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One arena file.

    Attributes:
        table: "sized" (LIBERO sets its size), or the name of a fixed body, or none.
        tops: the solid shapes of a fixed table.
        backdrop: shapes that are only drawn.
        floor_body: the floor plane sits in a body of its own, as LIBERO's floor and living-room scenes ask.
    """

    name: str
    floor: str
    wall: str
    table: str | None = None
    tops: tuple[Shape, ...] = ()
    backdrop: tuple[Shape, ...] = ()
    floor_body: bool = False

    @property
    def path(self) -> str:
        """Where LIBERO looks for the scene, relative to the pack."""
        return f"scenes/libero_{self.name}_base_style.xml"


def scenes() -> tuple[Scene, ...]:
    """Every arena that the tasks use."""
    tile, plaster = "light-gray-floor-tile.png", "light-gray-plaster.png"
    return (
        Scene(name="tabletop", floor=tile, wall=plaster, table="sized"),
        Scene(name="floor", floor=tile, wall=plaster, floor_body=True),
        Scene(
            name="kitchen_tabletop",
            floor="gray_ceramic_tile.png",
            wall="yellow_linen_wall_texture.png",
            table="sized",
            backdrop=_kitchen(),
        ),
        Scene(
            name="living_room_tabletop",
            floor="seamless_wood_planks_floor.png",
            wall=plaster,
            table="living_room_table",
            tops=_coffee_table(),
            backdrop=_sideboard(),
            floor_body=True,
        ),
        Scene(
            name="study",
            floor=tile,
            wall=plaster,
            table="study_table",
            tops=_desk(),
            backdrop=_bookshelf(),
        ),
    )


def _coffee_table() -> tuple[Shape, ...]:
    """Top at z 437 mm: 889 mm along x, 1343 mm along y, with round ends made of narrower boxes."""
    top = (413.0, 436.8)
    return (
        block((-694.0, 194.0), (-619.0, 724.0), top, COFFEE_TABLE),
        block((-667.0, 167.0), (698.0, 901.0), top, COFFEE_TABLE),
        block((-667.0, 167.0), (-821.0, -619.0), top, COFFEE_TABLE),
        block((-824.0, -669.0), (-619.0, 724.0), top, COFFEE_TABLE),
        block((184.0, 339.0), (-619.0, 724.0), top, COFFEE_TABLE),
        block((-662.0, 162.0), (-185.0, 685.0), (0.0, 413.0), COFFEE_TABLE),
    )


def _desk() -> tuple[Shape, ...]:
    """Top at z 885 mm, 1379 by 2786 mm, on four legs."""
    legs = tuple(
        block((x - 20.0, x + 20.0), (y - 50.0, y + 50.0), (0.0, 813.5), DESK)
        for x in (-500.0, 496.0)
        for y in (-691.0, 712.0)
    )
    return (block((-689.5, 689.5), (-1392.7, 1392.7), (813.5, 885.1), DESK), *legs)


def _kitchen() -> tuple[Shape, ...]:
    """A counter with a stove and a pot along the far wall, and a fridge."""
    return (
        block((-1990.0, -1350.0), (-1900.0, 2900.0), (0.0, 860.0), (0.86, 0.84, 0.79)),
        block((-1990.0, -1330.0), (-1900.0, 2900.0), (860.0, 900.0), (0.35, 0.33, 0.32)),
        block((-1900.0, -1400.0), (-350.0, 350.0), (900.0, 925.0), (0.15, 0.15, 0.16)),
        block((-1900.0, -1600.0), (-1000.0, -700.0), (900.0, 1080.0), (0.60, 0.61, 0.63)),
        block((-1990.0, -1450.0), (-2850.0, -1950.0), (0.0, 1900.0), (0.70, 0.71, 0.73)),
        block((-1990.0, -1650.0), (-1800.0, 2900.0), (1500.0, 2200.0), (0.80, 0.77, 0.70)),
    )


def _sideboard() -> tuple[Shape, ...]:
    """A low sideboard and a dark panel above it."""
    return (
        block((-1980.0, -1550.0), (-1500.0, 1500.0), (80.0, 480.0), (0.55, 0.42, 0.30)),
        block((-1980.0, -1900.0), (-700.0, 700.0), (700.0, 1450.0), (0.12, 0.12, 0.14)),
    )


def _bookshelf() -> tuple[Shape, ...]:
    """A white shelf with two dark books, and a picture on the wall."""
    return (
        block((-1980.0, -1550.0), (-1400.0, -300.0), (0.0, 900.0), (0.90, 0.90, 0.88)),
        block((-1760.0, -1640.0), (-520.0, -480.0), (900.0, 1080.0), (0.12, 0.12, 0.13)),
        block((-1760.0, -1640.0), (-470.0, -430.0), (900.0, 1060.0), (0.55, 0.12, 0.12)),
        block((-1985.0, -1960.0), (100.0, 900.0), (900.0, 1500.0), (0.35, 0.50, 0.60)),
    )


def scene_document(scene: Scene) -> ET.Element:
    """The arena's XML tree."""
    root = ET.Element("mujoco", model=f"{scene.name}_arena")
    asset = ET.SubElement(root, "asset")
    _add_textures(asset, scene)
    world = ET.SubElement(root, "worldbody")
    _add_floor(world, scene)
    _add_walls(world)
    for shape in scene.backdrop:
        _add_geom(world, shape, "1", {"contype": "0", "conaffinity": "0"})
    if scene.table == "sized":
        _add_sized_table(world)
    elif scene.table is not None:
        body = ET.SubElement(world, "body", name=scene.table, pos="0 0 0")
        for shape in scene.tops:
            _add_geom(body, shape, "0", CONTACT["firm"])
            _add_geom(body, shape, "1", {"contype": "0", "conaffinity": "0"})
    _add_lights_and_cameras(world)
    return root


def _add_textures(asset: ET.Element, scene: Scene) -> None:
    """`texplane` and `tex-wall` are the names whose files LIBERO replaces by its style's."""
    ET.SubElement(
        asset,
        "texture",
        type="skybox",
        builtin="gradient",
        width="64",
        height="64",
        rgb1="0.9 0.9 1",
        rgb2="0.2 0.3 0.4",
    )
    for texture, material, file in (("texplane", "floor", scene.floor), ("tex-wall", "wall", scene.wall)):
        ET.SubElement(asset, "texture", type="2d", name=texture, file=f"../textures/{file}")
        ET.SubElement(
            asset,
            "material",
            name=f"{material}_material",
            texture=texture,
            texrepeat="3 3",
            texuniform="true",
            reflectance="0",
            specular="0.1",
            shininess="0.1",
        )
    # Without a material a geom is glossy, and the lights burn white spots into the table.
    ET.SubElement(asset, "material", name="matte", specular="0.1", shininess="0.1", reflectance="0")


def _add_floor(world: ET.Element, scene: Scene) -> None:
    parent = ET.SubElement(world, "body", name="floor", pos="0 0 0") if scene.floor_body else world
    ET.SubElement(
        parent,
        "geom",
        name="floor",
        type="plane",
        pos="0 0 0",
        size="3 3 0.125",
        condim="3",
        group="1",
        material="floor_material",
    )


def _add_walls(world: ET.Element) -> None:
    """Visual only: planes are drawn from their front, so each faces the room."""
    for name, place, quat, size in (
        ("rear", "-2 0 1.5", "0.5 0.5 0.5 0.5", "3 1.5 0.01"),
        ("front", "3 0 1.5", "0.5 0.5 -0.5 -0.5", "3 1.5 0.01"),
        ("left", "0.5 3 1.5", "0.70711 0.70711 0 0", "2.5 1.5 0.01"),
        ("right", "0.5 -3 1.5", "0.70711 -0.70711 0 0", "2.5 1.5 0.01"),
    ):
        ET.SubElement(
            world,
            "geom",
            name=f"wall_{name}_visual",
            type="box",
            pos=place,
            quat=quat,
            size=size,
            group="1",
            contype="0",
            conaffinity="0",
            material="wall_material",
        )


def _add_sized_table(world: ET.Element) -> None:
    """LIBERO's table classes set these geoms' sizes and places."""
    body = ET.SubElement(world, "body", name="table", pos="0 0 0.4")
    wood = {"pos": "0 0 0", "material": "matte", "rgba": numbers((*TABLE_WOOD, 1.0))}
    solid = {"name": "table_collision", "type": "box", "size": "0.4 0.4 0.4", "group": "0"}
    ET.SubElement(body, "geom", solid | wood)
    drawn = wood | {"group": "1", "contype": "0", "conaffinity": "0"}
    ET.SubElement(body, "geom", {"name": "table_visual", "type": "box", "size": "0.4 0.4 0.4"} | drawn)
    for leg in range(1, 5):
        name = f"table_leg{leg}_visual"
        ET.SubElement(body, "geom", {"name": name, "type": "cylinder", "size": "0.05 0.1"} | drawn)
    ET.SubElement(body, "site", name="table_top", pos="0 0 0.4", size="0.001", rgba="0 0 0 0")


def _add_lights_and_cameras(world: ET.Element) -> None:
    for name, place in (("light1", "1 1 4"), ("light2", "-3 -3 4")):
        ET.SubElement(
            world,
            "light",
            name=name,
            pos=place,
            dir="0 -0.15 -1",
            diffuse="0.8 0.8 0.8",
            specular="0.3 0.3 0.3",
            directional="false",
            castshadow="false",
        )
    for name, place, quat in (
        ("frontview", "1 0 1.45", "0.56 0.43 0.43 0.56"),
        ("birdview", "-0.2 0 3", "0.70711 0 0 0.70711"),
        ("agentview", "0.5 0 1.35", "0.653 0.271 0.271 0.653"),
        ("sideview", "-0.0565 1.2761 1.4880", "0.00991 0.00688 0.59122 0.80642"),
    ):
        ET.SubElement(world, "camera", name=name, mode="fixed", pos=place, quat=quat)


def _add_geom(parent: ET.Element, shape: Shape, group: str, more: dict[str, str]) -> None:
    attributes = {
        "type": shape.kind,
        "pos": numbers(shape.centre, 1e-3),
        "size": numbers(shape.half, 1e-3),
        "quat": numbers(shape.turn),
        "group": group,
        "rgba": numbers((*shape.colour, 1.0)),
        "material": "matte",
    }
    ET.SubElement(parent, "geom", attributes | more)
