"""Write bills of materials (CycloneDX 1.6) of the built wheel: one per extra, all that pip would install.

Resolved, not installed: pip's own report says which files it would take, with digests, licences and
dependencies. The same wheel, index and ``SOURCE_DATE_EPOCH`` give the same bytes: the serial number is
made of the content, and the time is that of the last commit. CycloneDX's schema is held against each one.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tools.dist import ROOT, commit_time, digest

EXTRAS = ("", "s3", "trainer", "agent", "local", "rendezvous", "testing")


def resolve(wheel: Path, extra: str) -> list[dict[str, Any]]:
    """What pip would install: the entries of its report."""
    wanted = f"{wheel}[{extra}]" if extra else str(wheel)
    command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--dry-run"]
    command += ["--ignore-installed", "--report", "-", "--constraint", str(ROOT / "constraints.txt"), wanted]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    entries: list[dict[str, Any]] = json.loads(found)["install"]
    return entries


def bill(entries: Sequence[Mapping[str, Any]], extra: str, *, epoch: int, wheel_digest: str) -> Bom:
    """The document for one extra."""
    components = {name_of(entry): _component(entry, wheel_digest) for entry in entries}
    root = components.pop("dtrain")
    root.type = ComponentType.APPLICATION
    bom = Bom(components=components.values())
    # A serial number says which document this is: equal content, equal number.
    content = json.dumps([[str(part.purl), _sums(part)] for _, part in sorted(components.items())])
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, f"{root.purl}[{extra}]{wheel_digest}{epoch}{content}")
    bom.metadata.timestamp = datetime.fromtimestamp(epoch, UTC)
    bom.metadata.component = root
    here = (
        f"{platform.python_implementation()} {platform.python_version()} {sys.platform} {platform.machine()}"
    )
    bom.metadata.properties.add(Property(name="dtrain:resolved-for", value=here))
    bom.metadata.properties.add(Property(name="dtrain:extra", value=extra or "none"))
    known = components | {"dtrain": root}
    for entry in entries:
        depends = sorted(needs(entry, extra if name_of(entry) == "dtrain" else "") & known.keys())
        bom.register_dependency(known[name_of(entry)], [known[name] for name in depends])
    return bom


def name_of(entry: Mapping[str, Any]) -> str:
    """The normalised name of what an entry is about."""
    return str(canonicalize_name(entry["metadata"]["name"]))


def needs(entry: Mapping[str, Any], extra: str) -> set[str]:
    """Names of what it requires here, for its extras as they were asked for."""
    asked = ["", *entry.get("requested_extras", ()), *([extra] if extra else [])]
    found: set[str] = set()
    for text in entry["metadata"].get("requires_dist", ()):
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": each}) for each in asked):
            continue
        name = canonicalize_name(requirement.name)
        if name == name_of(entry):
            # An extra made of its own other extras.
            for inner in requirement.extras:
                found |= needs(entry, inner)
        else:
            found.add(str(name))
    return found


def document(bom: Bom) -> str:
    """The text of a document.

    Raises:
        SystemExit: it breaks CycloneDX's schema.
    """
    text = JsonV1Dot6(bom).output_as_string(indent=2) + "\n"
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        sys.exit(f"sbom: the document is not valid: {error}")
    return text


def _component(entry: Mapping[str, Any], wheel_digest: str) -> Component:
    metadata = entry["metadata"]
    name = name_of(entry)
    found = entry["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256", "")
    sha256 = wheel_digest if name == "dtrain" else found
    purl = PackageURL("pypi", None, name, metadata["version"])
    licences = LicenseFactory()
    told = _licence(metadata)
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=metadata["version"],
        bom_ref=str(purl),
        purl=purl,
        description=metadata.get("summary") or None,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else [],
        licenses=[licences.make_from_string(told)] if told else [],
    )


def _licence(metadata: Mapping[str, Any]) -> str:
    """What a package says of its licence in one line: an SPDX expression, a short text, or its classifier."""
    if expression := metadata.get("license_expression"):
        return str(expression)
    text = str(metadata.get("license") or "").strip()
    if text and "\n" not in text and len(text) < 80:
        return text
    classified = [str(each) for each in metadata.get("classifier", ()) if str(each).startswith("License ::")]
    return classified[0].rpartition(" :: ")[2] if classified else ""


def _sums(component: Component) -> list[str]:
    return sorted(each.content for each in component.hashes)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a bill of materials per extra of the built wheel.")
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"none, {', '.join(EXTRAS[1:])}")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    (wheel,) = args.dist.resolve().glob("dtrain-*.whl")
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or commit_time(ROOT))
    for extra in ["" if each == "none" else each for each in args.extras] or EXTRAS:
        entries = resolve(wheel, extra)
        text = document(bill(entries, extra, epoch=epoch, wheel_digest=digest(wheel)))
        file = args.dist / f"{'-'.join(wheel.name.split('-')[:2])}{f'-{extra}' if extra else ''}.cdx.json"
        file.write_text(text)
        print(f"{digest(file)}  {len(text):>7}  {file}: {len(entries)} components", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
