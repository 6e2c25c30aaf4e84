from __future__ import annotations

import io

from rich.console import Console

from gigaxt.cli.progress import Steps, clock_text


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_with_rate_and_time_left() -> None:
    clock, out = Clock(), io.StringIO()
    with Steps("scene.tif", "regions", console=Console(file=out, soft_wrap=True), clock=clock) as steps:
        for done in range(1, 41):
            clock.now += 1
            steps(done * 10, 400)
    assert out.getvalue().splitlines() == [
        "scene.tif  150/400 regions  10/s  25 s left",
        "scene.tif  300/400 regions  10/s  10 s left",
    ]
    assert steps.summary == "40 s, 10 regions/s"


def test_short_jobs_say_nothing() -> None:
    out = io.StringIO()
    with Steps("x", "rows", console=Console(file=out)) as steps:
        steps(1, 1)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with Steps("[x]", "rows", console=console) as steps:
        steps(1, 2)
        assert steps._bar is not None
        steps._bar.refresh()
    assert "[x]" in out.getvalue()
    assert "1/2" in out.getvalue()
    assert "rows/s" in out.getvalue()


def test_clock_text() -> None:
    times = {
        0.04: "0.0 s",
        9.94: "9.9 s",
        9.96: "10 s",
        59.4: "59 s",
        59.6: "1:00 min",
        125: "2:05 min",
        7260: "2:01 h",
    }
    assert {seconds: clock_text(seconds) for seconds in times} == times
    assert clock_text(3599.7) == "1:00 h"
