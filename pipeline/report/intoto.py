"""`test-result.intoto.json`: the gates of a run as an in-toto statement, to be signed and asked for by a policy.

Statement v1 (github.com/in-toto/attestation, spec/v1/statement.md) with the predicate test-result v0.1
(spec/predicates/test-result.md). It is not signed here: a signature is worth the key, which a pipeline does not have.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pipeline.report.facts import Facts, mapping, records, sequence
from pipeline.report.markup import json_text
from pipeline.report.verdicts import Tests, title_of
from stages.artifact import digest_of

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"
DIGEST = re.compile("[0-9a-f]{64}")


def render_statement(run: dict[str, Any]) -> str:
    """The statement of a run (`run.json`) about the files that may ship and the bundle, or, where it says FAILED, about
    every file that validate measured; empty where there is none, for a statement is about something.

    FAILED: a gate stops the run, the run did not come to its end, or no gate was checked. WARNED: gates are let
    through, or an engine is UNPROVEN. PASSED: nothing of these.
    """
    facts = Facts(run)
    tests = Tests(facts)
    failed = [f"{stage}: came to its end" for stage, _ in tests.broken]
    failed += [title_of(gate) for gate in facts.failed_gates]
    failed += [] if tests.gates else ["a gate was checked"]
    failed += ["the run passed"] if facts.status != "passed" and not failed else []
    subjects = subjects_of(facts, failed=bool(failed))
    if not subjects:
        return ""
    warned = [title_of(gate) for gate in facts.excused_gates]
    warned += [f"engine for {one.targets}: proven on its device" for one in facts.engines if not one.proven]
    statement = {
        "_type": STATEMENT,
        "subject": subjects,
        "predicateType": PREDICATE,
        "predicate": {
            "result": "FAILED" if failed else "WARNED" if warned else "PASSED",
            "configuration": configuration_of(facts),
            "passedTests": [
                *(f"{stage}: came to its end" for stage in tests.ended),
                *(title_of(gate) for gate in tests.gates if gate.passed),
            ],
            "warnedTests": warned,
            "failedTests": failed,
        },
    }
    return json_text(json.dumps(statement, indent=2)) + "\n"


def subjects_of(facts: Facts, failed: bool) -> list[dict[str, Any]]:
    """The files that validate measured and the tar, each once, with its SHA-256. Those of a candidate that did not
    pass, or is over a limit, are subjects of a statement that says FAILED alone."""
    validated = facts.measured("validate")
    found: dict[str, object] = {}
    for item in records(validated.get("candidates")):
        if not failed and (item.get("passed") is not True or sequence(item.get("over_limits"))):
            continue
        folder = f"{item['stage']}/" if item.get("stage") else ""
        files = mapping(item.get("files")) or {str(item.get("file") or item.get("name")): item.get("sha256")}
        found |= {f"{folder}{name}": digest for name, digest in files.items()}
    for item in records(validated.get("engines")):
        if sequence(item.get("ships_for")):
            found[f"engine {item.get('name')}"] = item.get("sha256")
    package = facts.measured("package")
    if facts.packed:
        found[f"package/{package.get('tar') or 'bundle.tar'}"] = package.get("sha256")
    return [
        {"name": name, "digest": {"sha256": digest}}
        for name, digest in found.items()
        if isinstance(digest, str) and DIGEST.fullmatch(digest)
    ]


def configuration_of(facts: Facts) -> list[dict[str, Any]]:
    """What was asked for (the canonical JSON of `config` in run.json) and the examples that it was measured on."""
    found = [{"name": "run.json#/config", "digest": {"sha256": digest_of(facts.run.get("config"))}}]
    fingerprint = facts.measured("validate").get("data_fingerprint")
    if isinstance(fingerprint, str) and DIGEST.fullmatch(fingerprint):
        found.append({"name": "test split", "digest": {"sha256": fingerprint}})
    return found
