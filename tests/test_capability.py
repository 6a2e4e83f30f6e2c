"""Capability vectors: the difference of two fine-tunings, merged into their base, in little memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.merging import measured
from configs.loader import dump_recipe, load_recipe
from learners.capability import CapabilityError, extract, read_manifest
from learners.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from learners.lineage import states_seen
from learners.merging import descends, merge
from policies.weights.shards import ShardFolder, Stored, write_shard

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"decoder.q.weight": (6, 4), "decoder.norm.weight": (4,), "head.weight": (3, 6)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def folder(path: Path, tensors: dict[str, torch.Tensor], shards: int = 2) -> Path:
    """The tensors in so many files, and a file that is none of them."""
    path.mkdir()
    names = list(tensors)
    for i in range(shards):
        held = {n: tensors[n] for n in names[i::shards]}
        save_file(held, path / f"model-{i}.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text("{}")
    (path / "assets").mkdir()
    (path / "assets" / "norm_stats.json").write_text("{}")
    return path


@pytest.fixture
def trio(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, plain and auxiliary fine-tuning; the last has a projector of its own, and one file where the base has
    two."""
    return (
        folder(tmp_path / "base", weights(0)),
        folder(tmp_path / "sft", weights(1)),
        folder(tmp_path / "aux", weights(2) | {"projector.weight": torch.ones(2, 2)}, shards=1),
    )


def read(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def test_a_vector_is_the_difference_of_what_all_three_hold(
    trio: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, sft, aux = trio
    manifest = extract(base, sft=sft, aux=aux, out=tmp_path / "gamma")
    gamma = read(tmp_path / "gamma")
    assert set(gamma) == set(weights(0))
    for name, tensor in gamma.items():
        torch.testing.assert_close(tensor, weights(2)[name] - weights(1)[name])
    assert read_manifest(tmp_path / "gamma") == manifest


def test_the_manifest_says_how_the_vector_lies_to_plain_fine_tuning(
    trio: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, sft, aux = trio
    manifest = extract(base, sft=sft, aux=aux, out=tmp_path / "gamma")
    flat = [torch.cat([weights(seed)[n].flatten() for n in weights(0)]) for seed in range(3)]
    gamma, moved = flat[2] - flat[1], flat[1] - flat[0]
    total = manifest.total()
    assert total.ratio == pytest.approx((gamma.norm() / moved.norm()).item(), rel=1e-5)
    assert total.cosine == pytest.approx(torch.cosine_similarity(gamma, moved, dim=0).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_0_is_the_base_to_the_bit_and_alpha_1_of_no_sft_is_the_auxiliary_run(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    base, aux = folder(tmp_path / "base", weights(0, dtype)), folder(tmp_path / "aux", weights(2, dtype))
    extract(base, sft=base, aux=aux, out=tmp_path / "gamma")
    merge(base, tmp_path / "gamma", alpha=0, out=tmp_path / "zero")
    merge(base, tmp_path / "gamma", alpha=1, out=tmp_path / "one")
    for name, tensor in read(tmp_path / "zero").items():
        assert torch.equal(tensor, weights(0, dtype)[name])
    for name, tensor in read(tmp_path / "one").items():
        torch.testing.assert_close(tensor, weights(2, dtype)[name], atol=0.02, rtol=0.01)
    names = [sorted(str(p.relative_to(root)) for p in root.rglob("*")) for root in (tmp_path / "one", base)]
    assert names[0] == sorted([*names[1], "merged.json"])
    with safe_open(tmp_path / "one" / "model-0.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_equal_runs_give_no_vector(tmp_path: Path) -> None:
    base, sft = folder(tmp_path / "base", weights(0)), folder(tmp_path / "sft", weights(1))
    manifest = extract(base, sft=sft, aux=sft, out=tmp_path / "gamma")
    assert all((tensor == 0).all() for tensor in read(tmp_path / "gamma").values())
    assert (manifest.total().gamma_norm, manifest.total().cosine) == (0, 0)


def test_a_vector_of_another_base_is_refused(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, sft, aux = trio
    extract(base, sft=sft, aux=aux, out=tmp_path / "gamma")
    with pytest.raises(CapabilityError, match=r"was extracted from the base .*merge it into the one"):
        merge(sft, tmp_path / "gamma", alpha=1, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_altered_vector_is_refused(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, sft, aux = trio
    extract(base, sft=sft, aux=aux, out=tmp_path / "gamma")
    (tmp_path / "gamma" / "model-1.safetensors").unlink()
    with pytest.raises(CapabilityError, match="is incomplete or altered"):
        merge(base, tmp_path / "gamma", alpha=1, out=tmp_path / "merged")


def test_what_does_not_go_together_is_refused(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, sft, aux = trio
    other = folder(tmp_path / "other", {"x": torch.ones(1), "y": torch.ones(1)})
    wide = folder(tmp_path / "wide", weights(3) | {"head.weight": torch.ones(3, 7)})
    broken = weights(3)
    broken["head.weight"][0, 0] = torch.nan
    with pytest.raises(CapabilityError, match=r"other lacks decoder.q.weight, which .*base has"):
        extract(base, sft=other, aux=aux, out=tmp_path / "gamma")
    with pytest.raises(CapabilityError, match=r"head.weight has shapes"):
        extract(base, sft=wide, aux=aux, out=tmp_path / "gamma")
    with pytest.raises(CapabilityError, match="1 non-finite of 18"):
        extract(base, sft=folder(tmp_path / "nan", broken), aux=aux, out=tmp_path / "gamma")
    with pytest.raises(CapabilityError, match="no capability vector"):
        merge(base, sft, alpha=1, out=tmp_path / "merged")
    with pytest.raises(CapabilityError, match=r"has no \*.safetensors"):
        extract(base, sft=sft, aux=tmp_path / "nowhere", out=tmp_path / "gamma")
    with pytest.raises(CapabilityError, match="exists"):
        extract(base, sft=sft, aux=aux, out=sft)
    assert not (tmp_path / "gamma").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".staging")]


def test_merged_weights_descend_from_the_vector_while_they_are_what_was_merged(
    trio: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, sft, aux = trio
    gamma, merged = tmp_path / "gamma", tmp_path / "merged"
    extract(base, sft=sft, aux=aux, out=gamma)
    with pytest.raises(CapabilityError, match=r"lies in .*base, which is copied there"):
        merge(base, gamma, alpha=1, out=base / "merged")
    merge(base, gamma, alpha=1, out=merged)
    assert [descends(path, gamma) for path in (base, merged, sft)] == [True, True, False]
    extract(merged, sft=sft, aux=aux, out=tmp_path / "second")
    assert descends(merged, tmp_path / "second")
    save_file(
        {n: t + 1 for n, t in load_file(merged / "model-1.safetensors").items()},
        merged / "model-1.safetensors",
    )
    with pytest.raises(CapabilityError, match=r"is not what merged.json says was merged there"):
        descends(merged, gamma)
    for text in ("{", "[]", "{}"):
        (merged / "merged.json").write_text(text)
        with pytest.raises(CapabilityError, match=r"merged.json does not say what was merged"):
            descends(merged, gamma)


def test_a_manifest_that_does_not_speak_of_its_tensors_is_refused(
    trio: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, sft, aux = trio
    extract(base, sft=sft, aux=aux, out=tmp_path / "gamma")
    file = tmp_path / "gamma" / "capability.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"layers": {}}))
    with pytest.raises(CapabilityError, match=r"capability.json and its tensors disagree about decoder.norm"):
        merge(base, tmp_path / "gamma", alpha=1, out=tmp_path / "merged")
    layer = next(iter(written["layers"]))
    for odd, said in (
        ({"base_hash": 5}, "base_hash: Input should be a valid string"),
        ({"gamma_hash": None}, "gamma_hash: Input should be a valid string"),
        ({"init_states": None}, "init_states: Input should be"),
        ({"init_states": "x"}, "init_states: "),
        ({"init_states": [{}]}, "init_states.0: Input should be a valid integer"),
        (
            {"layers": {layer: {"gamma_norm": "x", "sft_norm": 1.0, "inner": 0.0}}},
            "gamma_norm: Input should be",
        ),
        ({"layers": 3}, "layers: Input should be"),
    ):
        file.write_text(json.dumps(written | odd))
        with pytest.raises(CapabilityError, match="is not a capability vector's") as refused:
            merge(base, tmp_path / "gamma", alpha=1, out=tmp_path / "merged")
        assert said in str(refused.value)
    for text in (b"\xff\xfe", b"[" * 100_000, b"[]", json.dumps(written).encode()[:-1]):
        file.write_bytes(text)
        with pytest.raises(CapabilityError, match="is not a capability vector's"):
            merge(base, tmp_path / "gamma", alpha=1, out=tmp_path / "merged")


def test_states_seen_are_those_of_all_ancestors(tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in weights(0).items()}
    paths = [
        save_checkpoint(tmp_path, name, {n: a + i for n, a in arrays.items()}, {"init_states": states})
        for i, (name, states) in enumerate((("base", [0, 1]), ("sft", [0, 1, 5]), ("aux", [7, 0])))
    ]
    manifest = extract(paths[0], sft=paths[1], aux=paths[2], out=tmp_path / "gamma")
    assert manifest.init_states == [0, 1, 5, 7]
    merge(paths[0], tmp_path / "gamma", alpha=1, out=tmp_path / "merged")
    assert states_seen(tmp_path / "merged") == [0, 1, 5, 7]
    assert states_seen(tmp_path / "gamma") == []  # a vector is no weights; its manifest says
    (tmp_path / "merged" / "merged.json").write_text('{"init_states": ["all"]}')
    with pytest.raises(CheckpointError, match=r"init_states is \['all'\], expected whole numbers"):
        states_seen(tmp_path / "merged")
    (tmp_path / "merged" / "merged.json").write_text('{"alpha": 1.0}')
    with pytest.raises(CheckpointError, match=r"does not say which init_states were seen; merge again"):
        states_seen(tmp_path / "merged")


def test_checkpoints_that_do_not_say_what_they_saw_are_asked_for_their_recipes(tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in weights(0).items()}
    began: list[str] = []
    for name, state in (("first", 25), ("second", 3)):
        checkpoint = save_checkpoint(tmp_path / name / "checkpoints", "start", arrays, {"steps": 1})
        states = [f"tasks.demo_init_states=[{state}]", "tasks.train_init_states=[4]", *began]
        dump_recipe(load_recipe(QUICKSTART, states), tmp_path / name / "recipe.yaml")
        began = [f"supervised.init={checkpoint}"]
    second = tmp_path / "second" / "checkpoints" / "start"
    assert states_seen(second) == [3, 25]
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"and .*first/checkpoints/start, which it began with, is gone"):
        states_seen(second)
    mine = folder(tmp_path / "models", weights(0))  # beside somebody's own recipe, and of no run
    dump_recipe(load_recipe(QUICKSTART), tmp_path / "recipe.yaml")
    (mine / "metadata.json").write_text("[]")
    assert states_seen(mine) == []


def test_what_comes_of_a_run_s_checkpoint_is_one(tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in weights(0).items()}
    base = save_checkpoint(tmp_path, "start", arrays, {"steps": 3})
    extract(base, sft=base, aux=folder(tmp_path / "aux", weights(2)), out=tmp_path / "gamma")
    merge(base, tmp_path / "gamma", alpha=1, out=tmp_path / "merged")
    tensors, metadata = load_checkpoint(tmp_path / "merged")
    assert metadata == {"steps": 3}
    np.testing.assert_allclose(tensors["head.weight"], weights(2)["head.weight"].numpy(), atol=1e-6)


def test_a_shard_is_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = weights(0)
    stored = {n: Stored(file="own", dtype="F32", shape=tuple(t.shape)) for n, t in tensors.items()}
    write_shard(tmp_path / "own", stored, ((n, [t.numpy()]) for n, t in tensors.items()), {})
    for name, tensor in load_file(tmp_path / "own").items():
        assert torch.equal(tensor, tensors[name])
    for blocks, said in (
        ([np.zeros((4, 6), np.float32)], r"got rows \[6\] of float32 as decoder.q.weight, expected \[4\]"),
        ([np.zeros((4, 4), np.float32)], r"got decoder.q.weight of 64 bytes, expected .* \[6, 4\] of 96"),
    ):
        with pytest.raises(ValueError, match=said):
            write_shard(tmp_path / "own", stored, iter([("decoder.q.weight", blocks)]), {})


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "base", weights(0))
    save_file({"head.weight": torch.ones(1)}, path / "more.safetensors")
    with pytest.raises(ValueError, match=r"head.weight is in model-0.safetensors and in more.safetensors"):
        ShardFolder(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_blocks_give_what_the_whole_gives(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of two rows of the widest weight; a scalar too has one."""
    paths = [
        folder(tmp_path / name, weights(seed, dtype) | {"scale": torch.tensor(float(seed), dtype=dtype)})
        for seed, name in enumerate(("base", "sft", "aux"))
    ]
    made = []
    for block in (1 << 20, 12):
        monkeypatch.setattr("policies.weights.shards.BLOCK", block)
        gamma, out = tmp_path / f"gamma-{block}", tmp_path / f"merged-{block}"
        manifest = extract(paths[0], sft=paths[1], aux=paths[2], out=gamma)
        made.append((manifest, merge(paths[0], gamma, alpha=0.7, out=out), read(out)))
    (whole, one, first), (parts, other, second) = made
    assert (parts.base_hash, parts.gamma_hash, other) == (whole.base_hash, whole.gamma_hash, one)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, layer in whole.layers.items():
        assert parts.layers[name].inner == pytest.approx(layer.inner, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("rows", [1024, 65536])
def test_neither_extracting_nor_merging_takes_the_memory_of_a_shard(tmp_path: Path, rows: int) -> None:
    """Two shards of 128 MiB, as a model of 7 B weights has three of gigabytes: of many tensors, or of one alone, which
    an embedding may be."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{i}.weight": torch.randn(rows, 1024, generator=generator).bfloat16()
        for i in range(2 * 65536 // rows)
    }
    base, aux = folder(tmp_path / "base", tensors), tmp_path / "aux"
    folder(aux, {n: t + 1 for n, t in tensors.items()})
    del tensors
    gamma, merged = tmp_path / "gamma", tmp_path / "merged"
    for asked in (("extract", base, aux, gamma), ("merge", base, gamma, merged)):
        assert 0 < measured(*asked)["of_a_shard"] < 1, asked[0]
