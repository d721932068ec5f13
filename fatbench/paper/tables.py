"""Tables 1 to 4: each friendly defense against its base, under every attack."""

from __future__ import annotations

from fatbench.paper import verdicts as tests
from fatbench.paper.claims import Claim
from fatbench.paper.experiment import FRIENDS, WHOLE, Experiment, Whom, at, at_eps, every, longest, second
from fatbench.paper.verdicts import MARGIN, Test


def _table(place: str, base: str, paper: dict[str, str]) -> tuple[Test, ...]:
    """A friendly defense against its base: natural accuracy above, robust accuracy not below."""
    friend, key = FRIENDS[base], place.lower().replace(" ", "")
    more = Claim(f"{key}-natural", place, f"{friend} has more natural accuracy than {base}", paper.get("clean", ""))
    found = [tests.versus(more, at(friend), at(base), "clean")]
    for attack in WHOLE:
        printed = paper.get(attack, "")
        own = place if printed else "beyond the paper"
        claim = Claim(
            f"{key}-{attack}", own, f"{friend} is not below {base} by more than {MARGIN:g} under {attack}", printed
        )
        found.append(tests.versus(claim, at(friend), at(base), attack, MARGIN))
    return tuple(found)


def _larger(place: str, base: str, paper: dict[str, str]) -> tuple[Test, ...]:
    """The friendly defense trained at a larger budget, 16/255 in the paper, attacked at the same one as its base."""
    friend, key = FRIENDS[base], place.lower().replace(" ", "")
    who, told = at(friend, second), f"{friend} trained at eps {{second}}"
    robust = Claim(f"{key}-larger-pgd-20", place, f"{told} is above {base} under pgd-20", paper["pgd-20"])
    natural = Claim(
        f"{key}-larger-natural",
        place,
        f"{told} is not below {base} by more than {MARGIN:g} in natural accuracy",
        paper["clean"],
    )
    return (
        tests.versus(robust, who, at(base), "pgd-20"),
        tests.versus(natural, who, at(base), "clean", MARGIN),
    )


def _light() -> tuple[Test, ...]:
    """Table 2's first rows: beta 1."""
    friend, base = at("fat-trades", beta=1.0), at("trades", beta=1.0)
    more = "with beta 1, fat-trades has more natural accuracy than trades"
    natural = Claim("table2-beta1-natural", "Table 2", more, "89.94 against 88.64")
    least = f"with beta 1, fat-trades is not below trades by more than {MARGIN:g} under pgd-20"
    robust = Claim("table2-beta1-pgd-20", "Table 2", least, "49.70 against 49.14")
    return tests.versus(natural, friend, base, "clean"), tests.versus(robust, friend, base, "pgd-20", MARGIN)


def _larger_too(friend: str, *light: str) -> Whom:
    """The friendly one at the larger budget, and some with beta 1."""
    whom = [at(friend, second), *(at(one, beta=1.0) for one in light)]
    return lambda world: [one(world, world.budgets[-1]) for one in whom]


TABLES = {
    "table1": Experiment(
        "Table 1",
        "FAT against Madry, CAT and DAT",
        at_eps("standard", "madry", "cat", "dat", "fat", budgets=longest),
        WHOLE,
        (
            *_table(
                "Table 1",
                "madry",
                {
                    "clean": "89.34 against 87.30",
                    "fgsm": "65.52 against 56.10",
                    "pgd-20": "46.13 against 45.80",
                    "cw-inf": "46.82 against 46.80",
                },
            ),
            tests.versus(
                Claim("table1-cat-natural", "Table 1", "fat has more natural accuracy than cat", "89.34 against 77.43"),
                at("fat"),
                at("cat"),
                "clean",
            ),
            tests.versus(
                Claim("table1-cat-pgd-20", "Table 1", "fat is above cat under pgd-20", "46.13 against 46.06"),
                at("fat"),
                at("cat"),
                "pgd-20",
            ),
            tests.versus(
                Claim("table1-cat-cw-inf", "Table 1", "fat is above cat under cw-inf", "46.82 against 42.28"),
                at("fat"),
                at("cat"),
                "cw-inf",
            ),
            tests.versus(
                Claim("table1-dat-natural", "Table 1", "fat has more natural accuracy than dat", "89.34 against 85.03"),
                at("fat"),
                at("dat"),
                "clean",
            ),
            tests.versus(
                Claim("table1-dat-pgd-20", "Table 1", "dat is above fat under pgd-20", "48.70 against 46.13"),
                at("dat"),
                at("fat"),
                "pgd-20",
            ),
            *_larger("Table 1", "madry", {"clean": "87.00 against 87.30", "pgd-20": "49.86 against 45.80"}),
        ),
        every,
        (
            "madry-wrn-32-10-paper",
            "cat-wrn-32-10-paper",
            "dat-wrn-32-10-paper",
            "fat-wrn-32-10-eps8-paper",
            "fat-wrn-32-10-eps16-paper",
        ),
        beside=_larger_too("fat"),
    ),
    "table2": Experiment(
        "Table 2",
        "FAT for TRADES against TRADES",
        at_eps("trades", "fat-trades", budgets=longest),
        WHOLE,
        (
            *_table(
                "Table 2",
                "trades",
                {
                    "clean": "86.60 against 84.92",
                    "fgsm": "61.97 against 61.06",
                    "pgd-20": "55.98 against 56.61",
                    "pgd-100": "55.34 against 55.47",
                    "cw-inf": "54.29 against 54.47",
                },
            ),
            *_light(),
            *_larger("Table 2", "trades", {"clean": "84.39 against 84.92", "pgd-20": "57.12 against 56.61"}),
        ),
        every,
        (
            "trades-wrn-34-10-beta1-code",
            "trades-wrn-34-10-beta6-code",
            "fat-trades-wrn-34-10-beta1-eps8-paper",
            "fat-trades-wrn-34-10-beta6-eps8-paper",
            "fat-trades-wrn-34-10-beta6-eps16-paper",
        ),
        beside=_larger_too("fat-trades", "trades", "fat-trades"),
    ),
    "table3": Experiment(
        "Table 3",
        "as Table 2, attacked from random starts",
        at_eps("trades", "fat-trades", budgets=longest),
        WHOLE,
        _table(
            "Table 3",
            "trades",
            {
                "clean": "86.38 against 84.92",
                "fgsm": "67.64 against 67.00",
                "pgd-20": "56.65 against 57.18",
                "cw-inf": "54.51 against 54.72",
            },
        )[:5:2],
        every,
        ("fat-trades-wrn-58-10-beta6-eps8-paper", "fat-trades-wrn-58-10-beta6-eps16-paper"),
        "At laptop scale PGD starts at random in Table 2 too, and FGSM at the clean image in both.",
    ),
    "table4": Experiment(
        "Table 4",
        "FAT for MART against MART",
        at_eps("mart", "fat-mart", budgets=longest),
        WHOLE,
        (
            *_table(
                "Table 4",
                "mart",
                {
                    "clean": "86.40 against 83.62",
                    "fgsm": "68.94 against 67.38",
                    "pgd-20": "57.89 against 58.24",
                    "cw-inf": "52.28 against 53.67",
                },
            ),
            *_larger("Table 4", "mart", {"clean": "84.39 against 83.62", "pgd-20": "59.13 against 58.24"}),
        ),
        every,
        (
            "mart-wrn-34-10-paper",
            "fat-mart-wrn-34-10-eps8-paper",
            "fat-mart-wrn-34-10-eps16-paper",
            "fat-mart-wrn-58-10-eps8-paper",
            "fat-mart-wrn-58-10-eps16-paper",
        ),
        beside=_larger_too("fat-mart"),
    ),
}
