"""Prompts that are looked up before a request is taken: where a model knows no others than those of its run."""

from raydmd.data.prompts import PromptTable
from raydmd.errors import UserError
from raydmd.evaluation.prompts import known_row
from raydmd.serving.card import Offer
from raydmd.serving.parts import unknown_prompt


def check_prompt(offer: Offer, prompt: str) -> None:
    """Refuse a prompt that is not in the table of a run's prompts, of models that encode no text.

    A table that cannot be read from here lets all pass: who encodes the prompt may read it, or says why not.

    Raises:
        BadRequest: it is not among them.
    """
    if not isinstance(offer.texts, str):
        return
    try:
        table = PromptTable(offer.texts, [])
    except (UserError, OSError):
        return
    try:
        known_row(table, prompt, "prompt")
    except UserError as error:
        raise unknown_prompt(error, offer.texts, offer.card.first_frame != "none") from None
