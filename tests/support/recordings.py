"""Demonstrations made up for tests, and data sets laid out by hand as LeRobot and LIBERO do."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi0.base.video import write_video
from pi0.data import LEROBOT_NAMES, Demonstration, FeatureNames
from pi0.data.frames import encode_png

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
PROMPTS = ("pick up the black bowl", "open the top drawer")
SIZE = 32
FPS = 20


def upright_frame(step: int, seed: int, camera: int) -> np.ndarray:
    """A frame that tells its step, episode and camera, its sides and its ends; smooth, so that videos keep it."""
    frame = np.full((SIZE, SIZE, 3), (20 + 5 * step + 17 * seed) % 150, np.uint8)
    frame[:, SIZE // 2 :] += 60  # the right is brighter
    frame[SIZE // 2 :] += 30  # and so is what is below
    frame += np.uint8(5 * camera)
    return frame


def make_demonstration(steps: int, seed: int, prompt: str | None = None) -> Demonstration:
    """An episode whose every number is its own."""
    random = np.random.default_rng(seed)
    last = np.arange(steps) == steps - 1
    actions = random.uniform(-1, 1, (steps, 7)).astype(np.float32)
    return Demonstration(
        prompt=PROMPTS[seed % 2] if prompt is None else prompt,
        states=random.standard_normal((steps, 8)).astype(np.float32),
        actions=actions,
        image_steps=np.arange(steps),
        images={
            camera: np.stack([upright_frame(step, seed, number) for step in range(steps)])
            for number, camera in enumerate(CAMERAS)
        },
        executed=(actions / 2).astype(np.float32),
        rewards=last.astype(np.float32),
        dones=last,
    )


def write_info(root: Path, names: FeatureNames, version: str, total: int, video: bool, **changes) -> None:
    """meta/info.json as LeRobot writes it."""
    image = {
        "dtype": "video" if video else "image",
        "shape": [SIZE, SIZE, 3],
        "names": ["height", "width", "channel"],
    }
    one = {"shape": [1], "names": None}
    v2 = version != "v3.0"
    content = {
        "codebase_version": version,
        "robot_type": "panda",
        "total_episodes": total,
        "chunks_size": 2 if v2 else 1000,
        "fps": FPS,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        if v2
        else "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        if v2
        else "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {feature: image for feature in names.cameras.values()}
        | {
            names.state: {"dtype": "float32", "shape": [8], "names": ["state"]},
            names.actions: {"dtype": "float32", "shape": [7], "names": ["actions"]},
            "timestamp": {"dtype": "float32"} | one,
            "frame_index": {"dtype": "int64"} | one,
            "episode_index": {"dtype": "int64"} | one,
            "index": {"dtype": "int64"} | one,
            "task_index": {"dtype": "int64"} | one,
        },
    }
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta/info.json").write_text(json.dumps(content | changes))


def rows(demonstration: Demonstration, number: int, names: FeatureNames, video: bool) -> pa.Table:
    """An episode's rows as LeRobot stores them, images mirrored as of LIBERO."""
    steps = len(demonstration)
    columns = {
        names.state: pa.array(demonstration.states.tolist(), pa.list_(pa.float32(), 8)),
        names.actions: pa.array(demonstration.actions.tolist(), pa.list_(pa.float32())),
        "timestamp": pa.array((np.arange(steps) / FPS).astype(np.float32)),
        "frame_index": pa.array(np.arange(steps)),
        "episode_index": pa.array(np.full(steps, number)),
    }
    if not video:
        for camera, feature in names.cameras.items():
            columns[feature] = [
                {"bytes": encode_png(np.ascontiguousarray(frame[:, ::-1])), "path": None}
                for frame in demonstration.images[camera]
            ]
    return pa.table(columns)


def mirrored(demonstration: Demonstration, camera: str) -> list[np.ndarray]:
    return list(demonstration.images[camera][:, :, ::-1])


def write_separate_files(
    root: Path, demonstrations: list[Demonstration], names=LEROBOT_NAMES, version="v2.1", video=False
) -> None:
    """Layout v2.1: a parquet file and a video a camera for each episode, two episodes in a folder."""
    write_info(root, names, version, len(demonstrations), video)
    lines = []
    for number, demonstration in enumerate(demonstrations):
        folder = f"chunk-{number // 2:03d}"
        path = root / "data" / folder / f"episode_{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows(demonstration, number, names, video), path)
        for camera, feature in names.cameras.items() if video else ():
            film = root / "videos" / folder / feature / f"episode_{number:06d}.mp4"
            film.parent.mkdir(parents=True, exist_ok=True)
            write_video(film, mirrored(demonstration, camera), FPS)
        lines.append({"episode_index": number, "tasks": [demonstration.prompt], "length": len(demonstration)})
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_shared_files(
    root: Path, demonstrations: list[Demonstration], names=LEROBOT_NAMES, video=False
) -> None:
    """Layout v3.0: the first two episodes share a file and its one row group, the others share the next."""
    write_info(root, names, "v3.0", len(demonstrations), video)
    records = []
    for file, first in enumerate((0, 2)):
        numbers = range(len(demonstrations))[:2] if first == 0 else range(len(demonstrations))[2:]
        path = root / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables([rows(demonstrations[n], n, names, video) for n in numbers]), path)
        for camera, feature in names.cameras.items() if video else ():
            film = root / "videos" / feature / f"chunk-000/file-{file:03d}.mp4"
            film.parent.mkdir(parents=True, exist_ok=True)
            write_video(film, [frame for n in numbers for frame in mirrored(demonstrations[n], camera)], FPS)
        start = 0
        for number in numbers:
            length = len(demonstrations[number])
            record = {"episode_index": number, "tasks": [demonstrations[number].prompt], "length": length}
            record |= {"data/chunk_index": 0, "data/file_index": file}
            for feature in names.cameras.values() if video else ():
                record |= {f"videos/{feature}/chunk_index": 0, f"videos/{feature}/file_index": file}
                record |= {f"videos/{feature}/from_timestamp": start / FPS}
            records.append(record)
            start += length
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(records), path)


def write_hdf5(path: Path, demonstrations: dict[str, Demonstration], instruction: str | None) -> None:
    """LIBERO's layout, without its attributes if there is no instruction: as OpenVLA's replayed files."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if instruction is not None:
            data.attrs["problem_info"] = json.dumps({"language_instruction": instruction})
        for name, demonstration in demonstrations.items():
            demo = data.create_group(name)
            obs = demo.create_group("obs")
            obs["agentview_rgb"] = demonstration.images[CAMERAS[0]][:, ::-1]
            obs["eye_in_hand_rgb"] = demonstration.images[CAMERAS[1]][:, ::-1]
            obs["ee_states"] = demonstration.states[:, :6].astype(np.float64)
            obs["gripper_states"] = demonstration.states[:, 6:].astype(np.float64)
            demo["actions"] = demonstration.actions.astype(np.float64)
            demo["rewards"] = demonstration.rewards.astype(np.uint8)
            demo["dones"] = demonstration.dones.astype(np.uint8)
