"""requirements.lock matches pyproject.toml for every supported Python, without a host name."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).parents[2]
LOCK = (CHECKOUT / "requirements.lock").read_text(encoding="utf-8")
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = [name.split(" :: ")[-1] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]


def requirements(python: str) -> Iterator[Requirement]:
    """Yield the requirements in pyproject.toml for a Python version on Linux, without the package's own extras."""
    for text in [
        *PROJECT["dependencies"],
        *(one for extra in PROJECT["optional-dependencies"].values() for one in extra),
    ]:
        requirement = Requirement(text)
        if requirement.name != "tinyllama" and applies(requirement.marker, python):
            yield requirement


def applies(marker: Marker | None, python: str) -> bool:
    return marker is None or marker.evaluate({"python_version": python, "python_full_version": f"{python}.0"})


def locked(python: str) -> dict[str, str]:
    """Return the locked version of each package for a Python version."""
    lines = [line.removesuffix("\\").strip() for line in LOCK.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    pins = [pin for pin in map(Requirement, lines) if applies(pin.marker, python)]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def test_python_versions_match_documentation() -> None:
    assert PYTHONS == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


@pytest.mark.parametrize("python", [*PYTHONS, "3.14"])
def test_requirements_are_locked_within_bounds(python: str) -> None:
    pins = locked(python)
    wrong = [
        f"{one}, but {pins.get(canonicalize_name(one.name))} is locked; run make lock"
        for one in requirements(python)
        if not one.specifier.contains(pins.get(canonicalize_name(one.name), "0"), prereleases=True)
    ]
    assert not wrong


def test_torch_is_locked_at_the_version_that_make_installs() -> None:
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"^TORCH := torch==(.+)$", makefile, re.MULTILINE) == [locked(PYTHONS[0])["torch"]]


def test_locked_versions_have_hashes_and_no_host() -> None:
    for pin in re.split(r"^(?=[A-Za-z0-9])", LOCK, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in pin, pin
    assert not re.search(r"://|--(extra-)?index-url|--find-links|@ file", LOCK)


def test_requirements_have_lower_bounds() -> None:
    unbounded = [str(one) for one in requirements(PYTHONS[0]) if not any(one.specifier)]
    assert not unbounded
