"""Where a checkpoint or a file is: in a package, in a folder, in the hub's cache, or nowhere.

Knows no architecture. Asks the network once, with a short timeout: the hub's own client retries for
more than 20 seconds before it says that there is no network.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

from distill.errors import DataError, HubError, nearest
from distill.files import expanded

_SHIPPED = "(the shipped recipes' packages: pip install --no-deps -r requirements-demo.txt -r requirements-newsgroups.txt)"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def status(url: str, timeout: float = 3.0) -> int:
    """Ask a server once, and return its answer's HTTP status; an error status is an answer too.

    Raises:
        ConnectionError: nothing answers, or what does is no HTTP server; it says why.
    """
    try:
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - the callers' URLs are http
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ConnectionError(str(getattr(error, "reason", error)) or type(error).__name__) from None


@functools.cache
def reachable() -> bool:
    """Say whether the hub answers; where not, tell its client to work offline."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "TRUE", "YES", "ON"):
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        with contextlib.suppress(ConnectionError):
            status(endpoint)
            return True
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    return False


def is_hub_id(name: str) -> bool:
    """Say whether a name can be a hub id, and is no file here."""
    return bool(_HUB_ID.fullmatch(name)) and not expanded(name).exists()


def package_path(address: str) -> Path:
    """Resolve ``package://name/path`` to a path inside an installed package, without importing it.

    Raises:
        DataError: the package is not installed, has no such file, or the path leaves the package.
    """
    name, _, inner = address.removeprefix("package://").partition("/")
    if not name.isidentifier() or not inner or not inner.isprintable():
        raise DataError(f"{address}: must be package://name/path, the name as it is imported")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"{address}: package {name!r} is not installed here; pip install {name.replace('_', '-')}, or what its "
            f"distribution is called {_SHIPPED}"
        )
    # Several distributions may share a namespace package, each with a folder of its own.
    paths = []
    for place in spec.submodule_search_locations:
        root = Path(place).resolve()
        path = (root / inner).resolve()
        if not path.is_relative_to(root):
            raise DataError(f"{address}: leaves the package {name}")
        if path.exists():
            return path
        paths.append(path)
    beside = [p.name for path in paths if path.parent.is_dir() for p in path.parent.iterdir()]
    # Of a namespace a folder may be here without the distribution that is meant.
    hint = nearest(paths[0].name, beside) if beside else f"; is its distribution installed? {_SHIPPED}"
    raise DataError(f"{address}: package {name} has no {inner}{hint}")


def checkpoint(name: str, key: str) -> str:
    """Find a model folder, or make sure that a hub id can be loaded.

    Args:
        name: ``package://name/path``, a folder, or a hub id.
        key: the recipe key that named it, for messages.

    Returns:
        A folder, or the hub id when its files are in the local cache or can be fetched.

    Raises:
        HubError: it is not on this machine and the hub cannot be reached.
        DataError: no such package or folder.
    """
    if name.startswith("package://"):
        return str(package_path(name))
    folder = expanded(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DataError(
                f"{key}: {name} holds no config.json; it must be a folder that from_pretrained reads"
            )
        return str(folder)
    if not is_hub_id(name):
        raise DataError(f"{key}: there is no folder {name}")
    if not reachable():
        from huggingface_hub import try_to_load_from_cache

        files = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
        if not any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            raise HubError(
                f"{key}: checkpoint {name} is not on this machine and the hub cannot be reached; "
                f"fetch it where it can (hf download {name} --local-dir DIR) "
                f"and point the recipe to the copy (--set {key}=DIR)"
            )
    return name
