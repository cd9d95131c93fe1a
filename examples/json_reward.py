"""A reward of one's own: valid JSON with the keys asked for, and partial credit on the way there.

    python sppo.py --model ... --dataset people.jsonl --reward examples/json_reward.py:reward --suffix ""

Each row has a prompt and, as its answer, the JSON object that is wanted, as text:

    {"prompt": "Ada Lovelace, born 1815. Answer in JSON with the keys name and born.",
     "answer": "{\\"name\\": \\"Ada Lovelace\\", \\"born\\": 1815}"}

0.1 for a JSON object, up to 0.3 more for its keys, and up to 0.6 more for their values. Mind what the parts
add up to: a policy settles for what is easy, if that pays nearly as much as what is wanted.
"""
import json
import re


def reward(response: str, answer: str) -> float:
    """response: the policy's text; answer: a JSON object as text. A number from 0 to 1."""
    wanted = json.loads(answer)
    text = response.rpartition("</think>")[2]
    fenced = re.findall(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    try:
        found = json.loads(fenced[-1] if fenced else text)
    except (ValueError, RecursionError):  # not JSON, or nested too deeply
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    # Keys that nobody asked for count as well: else an object with every key in the world would be right.
    keys = found.keys() & wanted.keys()
    values = [key for key in keys if found[key] == wanted[key]]
    every = max(1, len(found.keys() | wanted.keys()))
    return 0.1 + 0.3 * len(keys) / every + 0.6 * len(values) / every
