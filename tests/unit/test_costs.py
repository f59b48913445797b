"""What benchmarks make of CPU times: per request, per token, of processes that come and go."""

from benchmarks.costs import medians, spent, split_costs


def test_a_token_costs_what_longer_answers_cost_more() -> None:
    costs = split_costs([{"gateway": 1e-3}], [{"gateway": 1.64e-3}], tokens=65)

    assert costs == {"gateway": {"us_per_request": 990.0, "us_per_token": 10.0}}


def test_a_child_that_some_runs_had_not_yet_costs_nothing_there() -> None:
    one = [{"worker": 1e-3}, {"worker": 1e-3}, {"worker": 1e-3}]
    many = [{"worker": 1e-3}, {"worker": 1e-3, "worker engine": 64e-6}, {"worker engine": 64e-6}]

    assert split_costs(one, many, tokens=65) == {
        "worker": {"us_per_request": 1000.0, "us_per_token": 0.0},
        "worker engine": {"us_per_request": -1.0, "us_per_token": 1.0},
    }
    assert split_costs(many[1:2], one[:1], tokens=65)["worker engine"] == {
        "us_per_request": 64.0,
        "us_per_token": 0.0,
    }


def test_a_process_that_took_the_place_of_another_begins_at_nothing() -> None:
    assert spent({"engine": 5.0, "gone": 1.0}, {"engine": 2.0, "new": 3.0}) == {
        "engine": 2.0,
        "new": 3.0,
    }
    assert spent({"engine": 5.0}, {"engine": 7.0}) == {"engine": 2.0}


def test_medians_are_of_all_runs() -> None:
    assert medians([{"a": 1.0}, {"a": 3.0, "b": 2.0}, {"a": 2.0}]) == {"a": 2.0, "b": 0.0}
