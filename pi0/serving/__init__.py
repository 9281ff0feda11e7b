"""Policies behind openpi's protocol. Its packages are an extra of the installed project."""

import importlib.util

from pi0.base.errors import MissingPackageError

_MISSING = [name for name in ("websockets", "msgpack") if importlib.util.find_spec(name) is None]
if _MISSING:
    raise MissingPackageError(
        f"{' and '.join(_MISSING)} not installed: pip install websockets==17.4 msgpack==1.2.4, or the project with its extra: "
        'pip install ".[serve]"'
    )
