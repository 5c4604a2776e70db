"""Language models whose subnets work: losses over large vocabularies, early exits, decoding that drafts with them."""

from unloaf.language.decoding import Round, generate
from unloaf.language.exits import ExitRow, judge_exits
from unloaf.language.speed import DecodingRow, measure_decoding

__all__ = ["DecodingRow", "ExitRow", "Round", "generate", "judge_exits", "measure_decoding"]
