"""Why something was not measured is said as long as it says something."""

from uellm_deployer.notes import KEPT_SECONDS, Notes


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_note_says_its_age_and_is_forgotten() -> None:
    clock = Clock()
    notes = Notes(clock)
    notes.add("a", "layers: broken", ["w1"])
    assert notes.shown(["w1"]) == ["layers: broken"]
    clock.now = 150.0
    assert notes.shown(["w1"]) == ["layers: broken (2 min ago)"]
    clock.now = KEPT_SECONDS + 1
    assert notes.shown(["w1"]) == []


def test_notes_go_with_what_they_are_about() -> None:
    notes = Notes(Clock())
    notes.add("a", "way: broken", ["w1", "w2"])
    notes.add("b", "took too long")
    notes.add("c", "measured since", ["w1"])
    notes.drop("c")
    assert notes.shown(["w1", "w2"]) == ["way: broken", "took too long"]
    assert notes.shown(["w1"]) == ["took too long"]
    notes.clear()
    assert notes.shown(["w1"]) == []
