import numpy as np

from qlora_jax.memory import peak_gb, peak_rss_gb


def test_the_peak_is_in_units_of_1e9_bytes_and_never_falls():
    before = peak_rss_gb()
    size = int(before * 1e9) + 200_000_000
    block = np.ones(size, np.uint8)  # touched, hence resident
    after = peak_rss_gb()
    assert before + 0.19 < after < before + 0.3 + size / 1e9
    del block
    assert peak_rss_gb() >= after
    assert peak_gb() >= after  # on a CPU the process is the device
