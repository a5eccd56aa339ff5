import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "torture"))
from audited import verdict  # noqa: E402

SOUND = {"name": "numpy", "version": "2.0", "vulns": []}
WEAK = {"name": "pillow", "version": "8.0", "vulns": [{"id": "CVE-2022-22817", "fix_versions": ["9.0.1"]}]}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("packages", "strict", "lenient"),
    [([SOUND], 0, 0), ([SOUND, WEAK], 1, 1), ([SOUND, SKIPPED], 1, 0), ([WEAK, SKIPPED], 1, 1), ([SKIPPED], 1, 0)],
)
def test_a_known_weakness_is_an_error_and_a_missing_list_in_ci_is_not(packages, strict, lenient):
    output = json.dumps({"dependencies": packages, "fixes": []})
    for where_reached, code in ((False, strict), (True, lenient)):
        lines, found = verdict(output, "", where_reached)
        assert found == code
        assert ("pillow 8.0: CVE-2022-22817" in lines) == (WEAK in packages)
        assert lines[-1].startswith(f"{sum(p is not SKIPPED for p in packages)} of {len(packages)} packages looked up")


def test_no_answer_at_all():
    assert verdict("", "Traceback\nrequests.ConnectionError: no route\n", False) == (
        ["no audit: requests.ConnectionError: no route"], 1,
    )  # fmt: skip
    assert verdict("", "", True) == (["no audit: no answer"], 0)
