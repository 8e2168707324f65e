import shutil

import numpy as np
import pytest

from tests.oracles import compare_live, goldens_folder

GOLDEN = goldens_folder() / "qwen3_tied"


@pytest.mark.parametrize(
    "harm, found",
    [
        ({}, (3, True)),
        ({"greedy_1": lambda tokens: tokens + (np.arange(20) == 19)}, (2, False)),
        ({"logits_2": lambda logits: logits + 2e-4 * np.abs(logits).max()}, (3, False)),
        ({"logits_0": lambda logits: np.nan * logits}, (3, False)),
    ],
)
def test_what_differs_from_the_golden_outputs_fails(tmp_path, capsys, harm, found):
    folder = shutil.copytree(GOLDEN, tmp_path / "one")
    golden = dict(np.load(folder / "golden.npz"))
    np.savez(folder / "golden.npz", **golden | {name: change(golden[name]) for name, change in harm.items()})
    comparison = compare_live.check([folder])
    assert (comparison.identical, comparison.passed) == found and comparison.total == 3
    assert ("DIFFERS" in capsys.readouterr().out) == (not comparison.passed)


def test_no_folders_fail(capsys):
    assert not compare_live.check([]).passed
