from benchmarks import step_flops


def test_a_step_of_orsta_7b_takes_at_most_two_fifths_of_verl_s_flops():
    """Also if neither has a reference, and with eight minibatches as in the paper."""
    ours, verl = step_flops.compare(step_flops.CONFIG, ())
    assert ours.keys() == {"tower", "updates"}
    assert 0.2 < step_flops.ratio(ours, verl) <= 0.4
    assert step_flops.ratio(ours, verl, but="reference") <= 0.4
    ours, verl = step_flops.compare(step_flops.CONFIG, [("grpo.minibatches", "8")])
    assert "old log-probs" in ours
    assert step_flops.ratio(ours, verl) <= 0.4
