"""A step's output on its way to the terminal and the log."""

import io

import pytest

from hvd.clusters.local.output import Stream, short


def feed(chunks, **options):
    screen, log = io.StringIO(), io.StringIO()
    stream = Stream(screen, log, **options)
    for chunk in chunks:
        stream.feed(chunk)
    return stream, screen.getvalue(), log.getvalue()


def test_lines_are_passed_on_with_the_prefix():
    _, screen, log = feed([b"one\ntw", b"o\n", b""], prefix="a | ")
    assert screen == "a | one\na | two\n"
    assert log == "one\ntwo\n"


def test_the_last_line_needs_no_newline():
    _, screen, log = feed([b"one", b""])
    assert (screen, log) == ("one\n", "one\n")


def test_of_a_bar_only_its_last_state_is_a_line():
    stream, screen, _ = feed([b"\r 0%", b"\r10%"])
    assert (stream.bar, screen) == ("10%", "")
    stream, screen, log = feed([b"\r 0%", b"\r10", b"0%\n", b"after\n", b""])
    assert (stream.bar, screen, log) == ("", "100%\nafter\n", "100%\nafter\n")


def test_a_terminal_gets_every_byte():
    _, screen, log = feed([b"\r 0%", b"\r10%\n", b""], raw=True)
    assert screen == "\r 0%\r10%\n"
    assert log == "10%\n"


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_letter_may_be_cut_in_the_middle(cut):
    text = "a\u2588b\n".encode()
    _, screen, _ = feed([text[:cut], text[cut:], b""])
    assert screen == "a\u2588b\n"


def test_a_bar_without_its_blocks():
    assert short("value:  45%|####     | 450/1000 [00:10<00:12, 43 step/s]") == (
        "value: 45% 450/1000 [00:10<00:12, 43 step/s]"
    )
