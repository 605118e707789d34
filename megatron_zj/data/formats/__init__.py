"""Input formats: files to canonical records.

``auto`` takes the first format that matches, so the order here goes from the specific to the general: a ranking has
a dialogue's keys and more, and nearly everything has a question.
"""

from megatron_zj.data.formats import dialogues, markup, prompts, rankings, texts
from megatron_zj.data.formats.registry import register

for _format in (*rankings.FORMATS, *dialogues.FORMATS, *texts.FORMATS, *markup.FORMATS, *prompts.FORMATS):
    register(_format)
