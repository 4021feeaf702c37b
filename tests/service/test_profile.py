"""ride-profile: how long each graph takes, before anything is served."""

import pytest

from service.profile import main


def test_every_graph_is_timed_at_every_batch_size(tiny_bundle, capsys):
    """Milliseconds, a row for each power of two up to the largest batch, under what runs them."""
    assert main(["--bundle", str(tiny_bundle), "--variant", "fp32", "--max-batch", "6", "--workers", "1"]) == 0
    title, _, head, _, *rows = capsys.readouterr().out.splitlines()

    assert "variant fp32, provider cpu" in title
    assert head == "| images | trunk | expert_0 | expert_1 | expert_2 |"
    table = [[float(cell) for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in table] == [1, 2, 4, 6]
    assert all(0 < time < 1000 for row in table for time in row[1:])


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--provider", "cuda"], 1, "ride-profile: RIDE_PROVIDER is cuda, this onnxruntime"),
        (["--bundle", "nowhere"], 2, "ride-profile: nowhere"),
        (["--max-batch", "0"], 2, "ride-profile: RIDE_MAX_BATCH (--max-batch) is '0'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(options, code, message, tiny_bundle, capsys):
    """With the exit code of whose mistake it is."""
    assert main(["--bundle", str(tiny_bundle), *options]) == code
    assert capsys.readouterr().err.startswith(message)
