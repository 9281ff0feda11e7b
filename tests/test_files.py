"""Files are whole or not there, whoever writes at the same time and however full the disk is, and where they were named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pi0.base.errors import InputError, MissingFileError, OutputError, Outputs
from pi0.base.files import LFS_POINTER, read_json, writable_dir, write_json, write_whole
from pi0.base.paths import REPO_ROOT, cache_dir
from pi0.base.video import write_video
from pi0.data.frames import VideoWriter, read_video
from pi0.training.run_folder import new_run_dir, take_run

WRITES_OFTEN = """
import sys
from pathlib import Path
from pi0.base.files import write_whole
for _ in range(200):
    write_whole(Path(sys.argv[1]), sys.argv[2] * 5000)
"""
ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from pi0.base.errors import OutputError
from pi0.training.run_folder import take_run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
try:
    take_run(Path(sys.argv[1]), {"note": "x" * 5000})
except OutputError as error:
    print(error)
"""


def start(code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.runs
def test_two_that_write_the_same_file_do_not_meet_and_readers_see_whole_ones(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "a" * 5000)
    writers = [start(WRITES_OFTEN, path, letter) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        assert path.read_text() in ("a" * 5000, "b" * 5000)
    assert [writer.communicate()[0] for writer in writers] == ["", ""]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.runs
@pytest.mark.tried("The disk is full when settings are written", "One line; the old file stays")
def test_what_a_full_disk_refuses_leaves_the_old_file_and_nothing_else(tmp_path):
    run_dir = new_run_dir(str(tmp_path), "run", {"note": "before"})
    output, _ = start(ON_A_FULL_DISK, run_dir).communicate(timeout=60)
    assert output == (f"cannot write to {run_dir}: File too large; make room, or choose another folder\n")
    assert (run_dir / "config.yaml").read_text() == "note: before\n"
    assert sorted(os.listdir(run_dir)) == [".lock", "config.yaml"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "config.yaml").mkdir()  # where the file belongs
    with pytest.raises(OutputError, match=f"cannot write to {tmp_path}"):
        take_run(tmp_path, {})


def test_text_and_bytes_are_written_as_they_are(tmp_path: Path):
    write_whole(tmp_path / "text", json.dumps("ü", ensure_ascii=False))
    write_whole(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == '"ü"'.encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"


def test_a_folder_of_results_may_be_below_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert writable_dir("~/runs/a") == tmp_path / "runs" / "a"
    assert (tmp_path / "runs" / "a").is_dir()


@pytest.mark.parametrize("file", ["file", "file/below"])
@pytest.mark.tried("PI0_CACHE_DIR names a file", "An error that names it")
def test_a_cache_folder_that_is_a_file_is_refused_by_name(tmp_path, monkeypatch, file):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PI0_CACHE_DIR", str(tmp_path / file))
    with pytest.raises(
        OutputError, match=f"^PI0_CACHE_DIR = {tmp_path / file} cannot be .*; set PI0_CACHE_DIR to a writable"
    ):
        cache_dir()


@pytest.mark.tried("A path with a colon", "Videos are written and read there")
def test_a_relative_path_with_a_colon_is_a_file_to_the_video_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("team:1")
    folder.mkdir()
    frames = list(np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8))
    write_video(folder / "film.mp4", frames, 10)
    writer = VideoWriter(folder / "set.mp4", 10, 64, 64)
    writer.write(frames)
    writer.close()
    for name in ("film.mp4", "set.mp4"):
        assert read_video(folder / name, np.array([0.0, 0.3]), 0.01).shape == (2, 64, 64, 3)


def test_what_was_not_written_is_remembered_until_it_is(tmp_path, capsys):
    outputs = Outputs()
    (tmp_path / "score.json").mkdir()
    outputs.write("score.json", write_json, tmp_path / "score.json", 1)
    outputs.write("table", write_json, tmp_path / "table", 1)
    assert list(outputs.missing) == ["score.json"]
    assert capsys.readouterr().out.startswith("score.json not written: ")
    with pytest.raises(OutputError, match=r"not the last of them:\n  score\.json: .*Is a directory"):
        outputs.check()
    (tmp_path / "score.json").rmdir()
    outputs.write("score.json", write_json, tmp_path / "score.json", 1)
    outputs.check()
    with pytest.raises(ZeroDivisionError):  # a fault of the program is no missing result
        outputs.write("ratio", lambda: 1 / 0)


def test_what_is_no_json_is_named(tmp_path):
    path = tmp_path / "times.json"
    with pytest.raises(MissingFileError, match=r"times\.json not found"):
        read_json(path)
    for content, said in (
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (LFS_POINTER, "git lfs pull"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"times\.json: .*{said}"):
            read_json(path)
    write_json(path, {"seconds": [1.5]})
    assert read_json(path) == {"seconds": [1.5]}
