"""The words of the built-in rules, read from `words/*.txt`: one line per language, phrases separated by `|`.

Opt-out and opt-in words count only as a whole message ("stop by the shop tomorrow" is none). `match` says how they are
compared, `gates` and `rules` what follows from them.
"""

from __future__ import annotations

from core.decide.match import Phrases
from core.decide.wordlists import load


def phrases(name: str) -> Phrases:
    return Phrases(load(name))


OPT_OUT = phrases("opt_out")
OPT_IN = phrases("opt_in")
HUMAN = phrases("human")
HUMAN_WHOLE = phrases("human_whole")
COMPLAINT = phrases("complaint")
GREETING = phrases("greeting")
THANKS = phrases("thanks")
PRICE = phrases("price")
ORDER = phrases("order")
AUTOMATIC = phrases("automatic")
