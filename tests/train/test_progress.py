from qlora_jax.train.progress import Progress


def test_steps_in_a_row():
    progress = Progress()
    for finite in (True, False, False, True, False):
        progress.took(finite=finite)
    assert (progress.skipped, progress.in_a_row) == (3, 1)


def test_the_best_evaluation():
    progress = Progress()
    losses = [float("nan"), 3.0, 3.0, 2.0, float("inf")]
    found = [progress.found(step, loss) for step, loss in enumerate(losses)]
    assert found == [False, True, False, True, False]
    assert (progress.best_step, progress.best_loss, progress.without) == (3, 2.0, 1)
