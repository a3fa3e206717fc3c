"""What templates are given to work with."""

import pytest

from signbit.report.rendering import _folded, render


def test_lines_that_hold_nothing_are_folded() -> None:
    assert _folded(" one\n\ntwo\n \n\n\t\n three\n\n\n") == "one\n\ntwo\n⋮\n three"
    assert _folded("\n\n\n") == ""


def test_what_a_template_is_not_given_is_an_error() -> None:
    with pytest.raises(Exception, match="'found' is undefined"):
        render("checkpoint.html")
