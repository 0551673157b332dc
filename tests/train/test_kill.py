import pytest

from tests.kill_run import kill_runs


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_as_an_unbroken_one(tmp_path):
    outcome = kill_runs(tmp_path, kills=10)
    assert outcome.kills == 10 and outcome.runs >= 1
    assert outcome.writing >= 1 and outcome.checkpoints >= 10
