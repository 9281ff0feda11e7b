"""Compiled scenes come from the cache unchanged, and from the compiler when the cache cannot be trusted."""

import os

import mujoco
import numpy as np
import pytest

from pi0.libero import scenes

pytestmark = pytest.mark.engine

TETRAHEDRON = """v 0 0 0
v {size} 0 0
v 0 {size} 0
v 0 0 {size}
f 1 3 2
f 1 2 4
f 1 4 3
f 2 3 4
"""


@pytest.fixture
def xml(tmp_path, monkeypatch):
    monkeypatch.setenv("PI0_CACHE_DIR", str(tmp_path / "cache"))
    mesh = tmp_path / "mesh.obj"
    mesh.write_text(TETRAHEDRON.format(size=1.0))
    return (
        f'<mujoco><asset><mesh name="m" file="{mesh}"/></asset><worldbody><body name="b"><freejoint/>'
        '<geom type="mesh" mesh="m"/></body></worldbody></mujoco>'
    )


def saved(model: mujoco.MjModel) -> bytes:
    buffer = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    return buffer.tobytes()


def entries(tmp_path):
    return sorted((tmp_path / "cache" / "scenes").iterdir())


def test_a_cached_scene_is_the_compiled_one_to_the_byte(xml, tmp_path, monkeypatch):
    compiled = saved(scenes.compile_scene(xml))
    assert compiled == saved(mujoco.MjModel.from_xml_string(xml))
    assert len(entries(tmp_path)) == 1
    monkeypatch.setattr(mujoco.MjModel, "from_xml_string", lambda *_: pytest.fail("compiled again"))
    assert saved(scenes.compile_scene(xml)) == compiled


@pytest.mark.parametrize("damage", [b"", b"\0" * 200, None], ids=["empty", "zeros", "truncated"])
@pytest.mark.tried("A scene in the cache is damaged", "It is made again")
def test_a_damaged_entry_is_made_again(xml, tmp_path, damage):
    compiled = saved(scenes.compile_scene(xml))
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-100] if damage is None else damage)
    assert saved(scenes.compile_scene(xml)) == compiled
    assert entry.read_bytes() == whole


def test_a_changed_mesh_makes_a_new_entry(xml, tmp_path):
    before = scenes.compile_scene(xml)
    mesh = tmp_path / "mesh.obj"
    mesh.write_text(TETRAHEDRON.format(size=2.0))
    os.utime(
        mesh, (mesh.stat().st_mtime + 5,) * 2
    )  # MuJoCo has a cache of its own, which looks at whole seconds
    after = scenes.compile_scene(xml)
    assert after.mesh_vert.max() > 1.5 * before.mesh_vert.max()
    assert len(entries(tmp_path)) == 2


def test_the_oldest_entries_go_when_the_cache_is_full(xml, tmp_path, monkeypatch):
    scenes.compile_scene(xml)
    (first,) = entries(tmp_path)
    monkeypatch.setattr(scenes, "MAX_CACHE_BYTES", int(1.5 * first.stat().st_size))
    scenes.compile_scene(xml.replace('name="b"', 'name="c"'))
    (kept,) = entries(tmp_path)
    assert kept != first


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(xml, tmp_path, caplog):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "scenes").write_text("a file where the folder should be")
    assert scenes.compile_scene(xml).nmesh == 1
    assert "could not be kept" in caplog.text
