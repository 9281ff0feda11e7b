"""What lies outside a run's folder but decides its results: remembered in its checkpoints, compared on resume."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pi0.libero import gl
from pi0.libero.environments import Environments
from pi0.libero.suites import package_of
from pi0.training.fingerprints import compare, fingerprint

SIMULATORS = ("mujoco", "robosuite", "hf-libero")


def compare_outside(
    environments: Environments, facts: Mapping[str, Any], paths: Mapping[str, str | None]
) -> dict[str, dict[str, str | None]]:
    """Fingerprints and versions of what a run stands on now, {"outside": {...}}, compared with those in its facts.

    Args:
        environments: whose assets, BDDL files and simulator decide what a score means; these must not change.
        facts: of the run's checkpoint, empty for a new run.
        paths: the files and folders that the run reads, by configuration key. A change is printed: the weights come
            from the checkpoint.

    Raises:
        OutputError: assets, BDDL files or the simulator are others.
    """
    assets = environments.pool.spec.assets.describe()
    packages = dict.fromkeys((*SIMULATORS, package_of(environments.benchmark_name)))
    fixed = {
        "assets": f"{assets['source']} {assets['fingerprint']}",
        **({"BDDL files": json.dumps(environments.bddl)} if environments.bddl else {}),
        **{name: version(name) for name in packages},
    }
    now = {
        **{key: fingerprint(path) for key, path in paths.items()},
        **fixed,
        "OpenGL": gl.renderer(),
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy")},
    }
    compare(facts.get("outside", {}), now, fixed)
    return {"outside": now}
