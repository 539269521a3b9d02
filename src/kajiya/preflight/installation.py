"""What the package's own metadata asks for, what of it is installed, and the command that installs the rest."""

import importlib.metadata
import importlib.util
import json
import shlex
import sys
from urllib.parse import unquote, urlsplit

from kajiya.run.provenance import package_version

PROJECT = "kajiya"


def declared_extras() -> list[str]:
    """Names of the extras that the package's metadata declares."""
    return importlib.metadata.metadata(PROJECT).get_all("Provides-Extra") or []


def requirements_of(extra: str) -> dict[str, bool]:
    """`{requirement: whether an installed version meets it}` of an extra alone, or of the package itself (`""`)."""
    from packaging.requirements import Requirement

    needed: dict[str, bool] = {}
    for text in importlib.metadata.requires(PROJECT) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        is_asked = marker is None or marker.evaluate({"extra": extra})
        is_always = marker is None or marker.evaluate({"extra": ""})
        if not is_asked or (extra and is_always):
            continue
        if requirement.name == PROJECT:
            for inner in requirement.extras:
                needed |= requirements_of(inner)
            continue
        version = package_version(requirement.name)
        bare = f"{requirement.name}{requirement.specifier}"
        needed[bare] = version is not None and requirement.specifier.contains(version, prereleases=True)
    return needed


def distribution_of(requirement: str) -> str:
    """Name of the distribution that a requirement asks for."""
    from packaging.requirements import Requirement

    return Requirement(requirement).name


def install_command(extra: str) -> str:
    """The command that installs an extra into this interpreter, from where the package itself came from."""
    suffix = f"[{extra}]" if extra else ""
    origin = importlib.metadata.distribution(PROJECT).read_text("direct_url.json")
    if origin is None:
        return pip_command(f"install {shlex.quote(PROJECT + suffix)}")
    facts = json.loads(origin)
    parts = urlsplit(facts["url"])
    if parts.scheme != "file" or "dir_info" not in facts:
        return pip_command(f"install {shlex.quote(f'{PROJECT}{suffix} @ ' + facts['url'])}")
    editable = "-e " if facts["dir_info"].get("editable") else ""
    return pip_command(f"install {editable}{shlex.quote(unquote(parts.path) + suffix)}")


def pip_command(words: str) -> str:
    """That pip command for this interpreter; uv's where the environment has no pip."""
    here = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is not None:
        return f"{here} -m pip {words}"
    verb, _, rest = words.partition(" ")
    return f"uv pip {verb} --python {here} {rest}"
