"""The page of a real `wanrt stream --serve` in a real browser."""

import numpy as np


def sky(picture):
    """The median colour of the top rows, of which the ball covers less than half: the place, whatever moves."""
    return np.median(picture.reshape(96, 160, 4)[:12, :, :3], axis=(0, 1))


def test_the_page_plays_and_a_typed_prompt_changes_the_picture(streaming, chromium, tmp_path):
    """The embedded model at the live demo's size; --quiet still prints the address, which is a result."""
    run = streaming(
        "a red ball bouncing over the ocean", "--size", "160x96", "--fps", 8, "--serve", "--quiet"
    )
    address = run.process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    chromium.visit(address)
    ready = "document.readyState === 'complete' && !!document.querySelector('video')"
    run.until(lambda: chromium.run(ready))
    now = "document.querySelector('video').currentTime"
    run.until(lambda: chromium.run(now) > 0.5)
    before = chromium.run(now)
    first = chromium.picture()
    run.until(lambda: chromium.run(now) > before + 2)
    second = chromium.picture()
    assert first.std() > 20, "a picture, not a black box"
    assert np.abs(first - second).mean() > 1, "that moves"
    assert np.abs(sky(first) - sky(second)).max() < 20, "and stays where it is"

    chromium.run("""document.getElementById('prompt').value = 'a yellow star spinning over a night sky';
        document.getElementById('blend').value = '0';
        document.getElementById('say').click()""")
    run.until(lambda: "from chunk" in chromium.run("document.getElementById('said').textContent"))
    run.until(
        lambda: np.abs(sky(chromium.picture()) - sky(second)).min() > 60
    )  # day to night, in every channel
    assert run.status()["prompt"] == "a yellow star spinning over a night sky"
    assert address.rsplit("/", 2)[1] not in run.talk, "the token is for whoever started it"
    run.end()
