"""A repository that was cloned without Git LFS has pointers in place of its large files: each kind is told as one."""

import pytest

from pi0 import PI0Policy
from pi0.base.errors import InputError
from pi0.data import open_demonstrations
from pi0.libero import standins
from pi0.libero.assets import AssetsError, resolve_assets
from pi0.policy.tokenizer import PaligemmaTokenizer
from tests.support.published_files import weights, write_lerobot, write_openpi
from tests.support.recordings import make_demonstration, write_hdf5, write_separate_files, write_shared_files

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 4264023\n"
)
PROCESSOR = "policy_preprocessor_step_5_normalizer_processor.safetensors"
STATISTICS = "assets/physical-intelligence/libero/norm_stats.json"


def read_all(path):
    return [demonstration.images for demonstration in open_demonstrations(path)]


def write_recordings(path):
    path.mkdir()
    write_hdf5(path / "task_demo.hdf5", {"demo_0": make_demonstration(6, 0)}, instruction=None)


@pytest.mark.parametrize(
    ("write", "file", "read"),
    [
        (lambda path: write_openpi(path, weights()), "model.safetensors", PI0Policy.from_pretrained),
        (lambda path: write_openpi(path, weights()), "config.json", PI0Policy.from_pretrained),
        (lambda path: write_openpi(path, weights()), STATISTICS, PI0Policy.from_pretrained),
        (lambda path: write_lerobot(path, weights()), "policy_preprocessor.json", PI0Policy.from_pretrained),
        (lambda path: write_lerobot(path, weights()), PROCESSOR, PI0Policy.from_pretrained),
        (lambda path: write_separate_files(path, [make_demonstration(6, 0)]), "meta/info.json", read_all),
        (lambda path: write_separate_files(path, [make_demonstration(6, 0)]), "meta/episodes.jsonl", read_all),
        (lambda path: write_separate_files(path, [make_demonstration(6, 0)]), "data/**/*.parquet", read_all),
        (lambda path: write_shared_files(path, [make_demonstration(6, seed) for seed in range(5)]), "meta/**/*.parquet", read_all),
        (lambda path: write_shared_files(path, [make_demonstration(6, seed) for seed in range(5)], video=True), "**/*.mp4", read_all),
        (write_recordings, "task_demo.hdf5", read_all),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.tried(
    "A Git LFS pointer in place of weights, configuration, statistics, parquet, video or HDF5",
    "An error with the file, and `git lfs pull`",
)
def test_a_pointer_is_told_with_what_to_run(tmp_path, write, file, read):
    write(tmp_path / "folder")
    pointer, *_ = sorted((tmp_path / "folder").glob(file))
    pointer.write_text(POINTER)
    with pytest.raises(InputError) as error:
        read(tmp_path / "folder")
    assert str(pointer) in str(error.value)
    assert "it is a Git LFS pointer, not the file that was meant: run git lfs pull" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pointer_in_place_of_a_tokenizer_is_told(tmp_path):
    (tmp_path / "tokenizer.model").write_text(POINTER)
    with pytest.raises(
        InputError, match="tokenizer.model: not a sentencepiece model: it is a Git LFS pointer"
    ):
        PaligemmaTokenizer(tmp_path / "tokenizer.model", 48)


@pytest.mark.tried(
    "A Git LFS pointer among LIBERO's assets", "An error with the file, before anything is simulated"
)
def test_a_pointer_among_the_assets_is_told_before_anything_is_simulated(tmp_path):
    standins.build(tmp_path)
    assert resolve_assets(str(tmp_path)).path == tmp_path
    mesh = min((tmp_path / "textures").iterdir())
    mesh.write_text(POINTER)
    with pytest.raises(AssetsError, match=f"textures/{mesh.name} is a Git LFS pointer.*git lfs pull"):
        resolve_assets(str(tmp_path))
