"""Tests of a board of your own.

pip install hypothesis pytest (beside mmchat)
pytest -p mmchat.regress --mmchat-model DIR examples/test_my_board.py
"""

from hypothesis import given, settings

from mmchat.regress import check
from mmchat.regress.strategies import conversations, prompts_of_rows

few = settings(max_examples=10, deadline=None)


@few
@given(talk=conversations(max_rows=600))
def test_conversations(mmchat_runtime, talk):
    check(mmchat_runtime, talk)  # no crash, counts, cap, same answers, same pictures, all strategies


@few
@given(text=prompts_of_rows(300))
def test_a_prompt_of_300_rows(mmchat_runtime, text):
    reply = mmchat_runtime.session().ask(text, max_new_tokens=1)
    assert reply.usage.n_prompt == 300
    assert reply.usage.restarts == 0
