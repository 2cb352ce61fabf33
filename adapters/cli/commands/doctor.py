"""`fluxion doctor`: checks of the installation, versions, devices, the Hub and its cache."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import threading
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from adapters.cli.console import facts, make_console, megabytes, print_json
from adapters.cli.damage import NAME, damage, owners
from adapters.cli.options import as_json

_PARTNERS = ("transformers", "diffusers", "accelerate", "peft", "gguf", "torchao", "bitsandbytes")
_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")
_LEAST_SPACE = 1_000_000_000  # bytes


@click.command()
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    help="The time that the Hub has to answer.",
)
@as_json
@click.pass_context
def doctor(context: click.Context, timeout: float, as_json: bool) -> None:
    """Check versions, devices, the Hub and other packages for problems.

    The Hub is not asked with HF_HUB_OFFLINE=1. The exit code is 1 if there are problems. Tokens are never shown.

    \b
    Example:
      fluxion doctor
    """
    problems: list[str] = []
    document = {
        "installation": _installation(problems),
        "versions": _versions(problems),
        "devices": _devices(problems),
        "hub": _hub(problems, timeout),
        "cache": _cache(problems),
    }
    if as_json:
        print_json({"ok": not problems, "problems": problems, **document})
    else:
        _show(document, problems)
    context.exit(1 if problems else 0)


# Checks. Each returns its findings, and adds problems with their fix.


def _installation(problems: list[str]) -> dict[str, Any]:
    if broken := damage():
        problems.append(broken)
    return {"folder": str(Path(__file__).parents[1]), "others": owners()}


def _versions(problems: list[str]) -> dict[str, str | None]:
    """Versions of required and supported packages; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), NAME: _version(NAME)}
    for name, needed, optional in _requirements():
        version = found[name] = _version(name)
        if version is None and not optional:
            problems.append(f"{name} is not installed: pip install '{name}{needed}'")
        elif version is not None and not needed.contains(version, prereleases=True):
            problems.append(f"{name} {version} does not fit {NAME}: pip install '{name}{needed}'")
    return found | {name: found.get(name) or _version(name) for name in _PARTNERS}


def _requirements() -> list[tuple[str, Any, bool]]:
    """Requirements of the distribution: name, versions, and whether an extra only needs it."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in (metadata.requires(NAME) if _version(NAME) else None) or ()]
    return [(one.name, one.specifier, bool(one.marker)) for one in wanted if not one.marker or one.name in _PARTNERS]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices(problems: list[str]) -> list[dict[str, Any]]:
    try:
        import torch
    except Exception as error:  # A broken installation may raise anything.
        problems.append(f"torch cannot be imported, {_said(error)}: install it again, as https://pytorch.org says.")
        return []
    cpu = {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    found = [{"device": "cpu", **cpu, "dtypes": _computing("cpu")}]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
        module = torch.get_device_module(kind)
        for place in range(torch.accelerator.device_count()):
            about = {"name": module.get_device_name(place)} if hasattr(module, "get_device_name") else {}
            if hasattr(module, "mem_get_info"):
                about["free_bytes"], about["bytes"] = module.mem_get_info(place)
            found.append({"device": f"{kind}:{place}", **about, "dtypes": _computing(f"{kind}:{place}")})
    elif torch.version.cuda and Path("/dev/nvidia0").exists():
        problems.append(
            f"There is a GPU that torch, made for CUDA {torch.version.cuda}, cannot use: update the driver,"
            " or install the torch that fits it, as https://pytorch.org says."
        )
    return found


def _computing(device: str) -> list[str]:
    """Dtypes that a device can multiply matrices in."""
    import torch

    found: list[str] = []
    for name in _DTYPES:
        try:
            matrix = torch.ones(16, 16, device=device).to(getattr(torch, name))
            (matrix @ matrix).float().sum().item()
        except (RuntimeError, TypeError, AttributeError):
            continue
        found.append(name)
    return found


def _hub(problems: list[str], timeout: float) -> dict[str, Any]:
    try:
        from huggingface_hub import constants, get_token
    except Exception as error:
        problems.append(f"huggingface_hub cannot be imported, {_said(error)}: pip install --upgrade huggingface_hub")
        return {}
    parts = urlsplit(constants.ENDPOINT)
    site = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # without a password
    found = {"endpoint": site, "offline": constants.HF_HUB_OFFLINE, "token": bool(get_token())}
    if constants.HF_HUB_OFFLINE:
        return found
    answer: dict[str, Any] = {"problem": f"{site} has not answered in {timeout:g} seconds: check the network."}
    asking = threading.Thread(target=lambda: answer.update(_asked(site, timeout)), daemon=True)
    asking.start()  # The client may exceed its timeout: in a DNS lookup, for one.
    asking.join(timeout)
    answer = dict(answer)
    if problem := answer.pop("problem"):
        problems.append(f"{problem} Without the Hub, local files and what is in the cache still work.")
    return {**found, "reached": False, "user": None, **answer}


def _asked(site: str, timeout: float) -> dict[str, Any]:
    """Whether the Hub answers, and the account of the token."""
    from huggingface_hub import HfApi, constants, get_session, get_token
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if token := get_token():
            return {"reached": True, "user": HfApi().whoami(token)["name"], "problem": None}
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except HfHubHTTPError as error:
        status = error.response.status_code
        way = "run `hf auth login`, or set HF_TOKEN to one that is valid." if status == 401 else "try again later."
        return {"reached": True, "problem": f"{site} answers {status} to the token: {way}"}
    except Exception as error:  # Its text may hold the token.
        return {"problem": f"{site} cannot be reached ({type(error).__name__}): check the network and HF_ENDPOINT."}
    return {"reached": True, "problem": None}


def _cache(problems: list[str]) -> dict[str, Any]:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except Exception:  # reported already
        return {}
    folder = Path(HF_HUB_CACHE)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        problems.append(f"{folder} cannot be written, {error.strerror}: set HF_HOME to a folder that can.")
    if free < _LEAST_SPACE:
        problems.append(f"{folder} has {megabytes(free)} left: make room, or set HF_HOME to a folder on another disk.")
    return {"folder": str(folder), "free_bytes": free}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# How it is shown


def _show(document: dict[str, Any], problems: list[str]) -> None:
    versions, hub, cache = document["versions"], document["hub"], document["cache"]
    console = make_console()
    rows = {"system": f"{platform.system()} {platform.machine()}, {sys.executable}"}
    rows |= {name: version or "not installed" for name, version in versions.items()}
    rows[NAME] += f", in {document['installation']['folder']}"
    rows |= {one["device"]: _described(one) for one in document["devices"]}
    if hub:
        reached = "offline, by HF_HUB_OFFLINE" if hub["offline"] else "reached" if hub["reached"] else "not reached"
        stored = "a token" if hub["token"] else "no token: public repositories can be read"
        rows["Hub"] = f"{hub['endpoint']}, {reached}"
        rows["account"] = hub.get("user") or stored
    if cache:
        rows["cache"] = f"{cache['folder']}, {megabytes(cache['free_bytes'])} free"
    facts(console, rows)
    for problem in problems:
        console.print(f"\nWrong: {problem}", style="bold red", soft_wrap=True)
    if not problems:
        console.print("\nNothing is wrong.", style="bold")


def _described(device: dict[str, Any]) -> str:
    told = [device.get("name", "")]
    if "threads" in device:
        told.append(f"{device['threads']} of {os.cpu_count()} threads")
    if "bytes" in device:
        told.append(f"{megabytes(device['free_bytes'])} of {megabytes(device['bytes'])} free")
    return ", ".join([*filter(None, told), *device["dtypes"]])
