"""A short run that is recorded."""

import pytest
import tiny


def rounded(value):
    return pytest.approx(value, rel=1e-4)


def recorded(options, steps=7, **log):
    model = tiny.llama()
    optimizer = tiny.grit(model, **options)
    records = []
    optimizer.log_to(records.append, **{"every": 3, **log})
    losses = tiny.train(model, optimizer, steps)
    optimizer.close()
    return optimizer, records, losses
