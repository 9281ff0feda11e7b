"""Where geometry comes from, what is said about it, and that getting it asks nothing and hangs nowhere."""

import http.server
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from pi0.base.paths import REPO_ROOT, cache_dir
from pi0.libero import assets as assets_module
from pi0.libero import standins
from pi0.libero.assets import EXPECTED_FOLDERS, Assets, AssetsError, resolve_assets, use_assets

RESOLVE = """
import json, logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from pi0.libero.assets import resolve_assets
found = resolve_assets()
print(json.dumps([found.source, str(found.path)]))
"""

# The hub's client is not among the project's packages; this one stands at that boundary.
FAKE_HUB_CLIENT = """
import os, sys
def snapshot_download(repo_id, repo_type, local_dir, **options):
    if os.environ.get("HUB_BREAKS"):
        os.makedirs(os.path.join(local_dir, "scenes"))
        raise OSError("connection reset half way")
    sys.path.insert(0, os.environ["PYTHONPATH"].split(os.pathsep)[0])
    from pi0.libero.standins import build
    build(local_dir)
    return local_dir
"""


def python(
    code: str, cache: Path, *, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process with its own cache and an empty home, standard input closed."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environment(cache, **environment),
        cwd=cache,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def clean_environment(cache: Path, **environment: str) -> dict[str, str]:
    home = cache.parent / "home"
    home.mkdir(exist_ok=True)
    dropped = ("LIBERO_", "HF_", "PI0_", "XDG_", "MPL", "MESA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    path = os.pathsep.join([str(REPO_ROOT), environment.pop("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**kept, "HOME": str(home), "PI0_CACHE_DIR": str(cache), "PYTHONPATH": path, **environment}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, for this process and for those it starts."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("PI0_CACHE_DIR", str(folder))
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A complete assets folder."""
    standins.build(tmp_path / "assets")
    return tmp_path / "assets"


@pytest.fixture
def no_installed_assets():
    installed = Path(assets_module.libero_package_root()) / "assets"
    if installed.is_dir():
        pytest.skip("the installed LIBERO has assets of its own")


# Order


def test_configured_path_comes_first(cache, folder, monkeypatch):
    monkeypatch.setenv("LIBERO_ASSETS", "/nowhere")
    assert resolve_assets(str(folder)) == Assets("configured", folder)


def test_environment_variable_configures_too(cache, folder, monkeypatch):
    monkeypatch.setenv("LIBERO_ASSETS", str(folder))
    assert resolve_assets() == Assets("configured", folder)


def test_standins_can_be_configured(cache, folder, monkeypatch):
    monkeypatch.setenv("LIBERO_ASSETS", str(folder))
    assert resolve_assets("standins").source == "standins"


def test_installed_package_comes_before_hub_and_standins(cache, folder, monkeypatch):
    monkeypatch.setattr(assets_module, "libero_package_root", lambda: folder.parent)
    assert resolve_assets() == Assets("installed", folder)


def test_half_an_installed_folder_is_skipped(cache, folder, monkeypatch, caplog):
    monkeypatch.setattr(assets_module, "libero_package_root", lambda: folder.parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.rmtree(folder / "textures")
    assert resolve_assets().source == "standins"
    assert "textures" in caplog.text


@pytest.mark.runs
@pytest.mark.usefixtures("no_installed_assets")
def test_standins_come_last(cache):
    done = python(RESOLVE, cache, HF_HUB_OFFLINE="1")
    assert json.loads(done.stdout)[0] == "standins", done.stderr


# Errors


def test_a_configured_path_that_is_not_there_is_an_error(cache):
    with pytest.raises(AssetsError, match="/no/such/assets does not exist"):
        resolve_assets("/no/such/assets")


def test_a_configured_folder_names_what_it_lacks(cache, folder):
    shutil.rmtree(folder / "scenes")
    shutil.rmtree(folder / "turbosquid_objects")
    with pytest.raises(AssetsError, match=f"{folder} lacks scenes, turbosquid_objects"):
        resolve_assets(str(folder))


# The hub


@pytest.fixture
def hub_client(tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "huggingface_hub.py").write_text(FAKE_HUB_CLIENT)
    return str(tmp_path / "packages")


@pytest.fixture
def hub_server():
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.runs
@pytest.mark.usefixtures("no_installed_assets")
def test_a_silent_hub_is_given_up_after_seconds(cache, hub_client):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        done = python(RESOLVE, cache, PYTHONPATH=hub_client, HF_ENDPOINT=endpoint, no_proxy="127.0.0.1")
        waited = time.monotonic() - start
    assert json.loads(done.stdout)[0] == "standins", done.stderr
    assert f"no answer from {endpoint}" in done.stderr
    assert waited < 15


@pytest.mark.runs
@pytest.mark.usefixtures("no_installed_assets")
def test_a_reachable_hub_is_asked_once(cache, hub_client, hub_server):
    environment = {"PYTHONPATH": hub_client, "HF_ENDPOINT": hub_server, "no_proxy": "127.0.0.1"}
    done = python(RESOLVE, cache, **environment)
    source, path = json.loads(done.stdout.splitlines()[-1])
    assert source == "hub", done.stderr
    assert Path(path).is_relative_to(cache)
    again = python(RESOLVE, cache, HF_HUB_OFFLINE="1")
    assert json.loads(again.stdout) == [source, path], again.stderr
    assert not list((cache.parent / "home").iterdir())


@pytest.mark.runs
@pytest.mark.usefixtures("no_installed_assets")
def test_a_broken_download_leaves_nothing_behind_and_says_why(cache, hub_client, hub_server):
    environment = {
        "PYTHONPATH": hub_client,
        "HF_ENDPOINT": hub_server,
        "no_proxy": "127.0.0.1",
        "HUB_BREAKS": "1",
    }
    done = python(RESOLVE, cache, **environment)
    assert json.loads(done.stdout.splitlines()[-1])[0] == "standins"
    assert "connection reset half way" in done.stderr
    assert not [path for path in (cache / "libero").iterdir() if path.is_dir()]


# Said and recorded


def test_use_is_announced_once(cache, folder, caplog):
    caplog.set_level(logging.INFO)
    chosen = Assets("configured", folder)
    use_assets(chosen)
    use_assets(chosen)
    assert caplog.text.count(f"configured ({folder})") == 1


def test_a_folder_is_recorded_with_path_and_content(cache, folder):
    before = Assets("configured", folder).describe()
    assert before["source"] == "configured"
    assert before["path"] == str(folder)
    (folder / "scenes" / "libero_tabletop_base_style.xml").unlink()
    assert Assets("configured", folder).describe()["fingerprint"] != before["fingerprint"]


def test_standins_are_recorded_alike_on_every_machine(cache, tmp_path):
    here = resolve_assets("standins").describe()
    standins.build(tmp_path / "elsewhere")
    assert here == Assets("standins", tmp_path / "elsewhere").describe()
    assert str(cache) not in json.dumps(here)


# The stand-ins' cache


def test_standins_have_every_folder_that_libero_reads(cache):
    assert {path.name for path in standins.standins_path().iterdir() if path.is_dir()} == set(
        EXPECTED_FOLDERS
    )


def test_standins_stay_in_the_cache(cache):
    first = standins.standins_path()
    built = first.stat().st_ctime_ns
    assert first.is_relative_to(cache_dir())
    assert standins.standins_path() == first
    assert first.stat().st_ctime_ns == built


@pytest.mark.parametrize("damage", ["truncated", "missing", "altered", "no manifest", "unreadable manifest"])
def test_damaged_standins_are_built_again(cache, damage):
    path = standins.standins_path()
    whole = standins.fingerprint(path)
    bowl = path / "stable_scanned_objects" / "akita_black_bowl" / "akita_black_bowl.xml"
    text = bowl.read_text()
    if damage == "truncated":
        bowl.write_text(text[: len(text) // 2])
    elif damage == "missing":
        bowl.unlink()
    elif damage == "altered":
        bowl.write_text(text.replace("0.0425", "0.0426"))
    elif damage == "no manifest":
        (path / standins.MANIFEST).unlink()
    else:
        (path / standins.MANIFEST).write_text("{")
    assert standins.standins_path() == path
    assert bowl.read_text() == text
    assert standins.fingerprint(path) == whole


@pytest.mark.runs
def test_processes_that_start_together_share_one_build(cache):
    code = "from pi0.libero.standins import standins_path; print(standins_path())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=clean_environment(cache),
            stdout=subprocess.PIPE,
            text=True,
            cwd=cache,
        )
        for _ in range(3)
    ]
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert paths == {str(standins.standins_path())}
    assert [entry.name for entry in (cache / "standins").iterdir() if entry.is_dir()] == [
        Path(paths.pop()).name
    ]


# LIBERO's configuration


BUILD_AN_ENVIRONMENT = """
from pi0.libero.assets import resolve_assets, use_assets
from pi0.libero.suites import suite_tasks
use_assets(resolve_assets("standins"))
from libero.libero.envs.env_wrapper import ControlEnv
task = suite_tasks("libero_object")[0]
env = ControlEnv(bddl_file_name=task.bddl_file, use_camera_obs=False, has_offscreen_renderer=False)
env.seed(0)
env.reset()
"""


@pytest.mark.runs
def test_libero_asks_nothing_and_leaves_the_home_empty(cache):
    done = python(BUILD_AN_ENVIRONMENT, cache)
    assert done.returncode == 0, done.stderr
    assert "Do you want" not in done.stdout
    assert "macro" not in done.stderr
    assert [str(path) for path in (cache.parent / "home").rglob("*")] == []


A_WORKERS_START = """
import sys
from pi0.libero.libero_import import leave_out_wrappers
from pi0.libero.assets import resolve_assets
leave_out_wrappers()
from pi0.libero.stepping import TaskSim
from pi0.libero.suites import suite_tasks
print(TaskSim(suite_tasks("libero_object")[0], resolve_assets("standins")).model.nq)
print([name for name in ("matplotlib", "gymnasium", "torch", "scipy.linalg", "cv2") if name in sys.modules])
from scipy import linalg  # which numba has in part
print(linalg.inv([[2.0, 0.0], [0.0, 4.0]]).diagonal())
"""


@pytest.mark.runs
def test_a_worker_imports_no_wrappers(cache):
    done = python(A_WORKERS_START, cache)
    assert done.returncode == 0, done.stderr
    size, imported, diagonal = done.stdout.splitlines()[-3:]
    assert int(size) > 20
    assert imported == "[]"
    assert diagonal == "[0.5  0.25]"


@pytest.mark.runs
def test_processes_that_start_together_share_one_configuration(cache):
    code = (
        "from pi0.libero.libero_import import prepare_libero as p; print(p().get_libero_path('bddl_files'))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=clean_environment(cache),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            cwd=cache,
        )
        for _ in range(4)
    ]
    answers = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(answers) == 1
    assert Path(answers.pop()).is_dir()
    assert [path.name for path in (cache / "libero").iterdir()] == ["config.yaml"]


@pytest.mark.runs
def test_a_moved_environment_gets_a_fresh_configuration(cache):
    (cache / "libero").mkdir()
    (cache / "libero" / "config.yaml").write_text("bddl_files: /an/older/environment\n")
    done = python("from pi0.libero.libero_import import prepare_libero; prepare_libero()", cache)
    assert done.returncode == 0, done.stderr
    assert Path(yaml.safe_load((cache / "libero" / "config.yaml").read_text())["bddl_files"]).is_dir()


@pytest.mark.runs
def test_a_users_own_configuration_is_left_alone(cache, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text("datasets: /my/data\n")
    code = "from pi0.libero.libero_import import prepare_libero as p; print(p().get_libero_path('datasets'))"
    done = python(code, cache, LIBERO_CONFIG_PATH=str(mine))
    assert done.stdout.strip() == "/my/data", done.stderr
    assert (mine / "config.yaml").read_text() == "datasets: /my/data\n"
