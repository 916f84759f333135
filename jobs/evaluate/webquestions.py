"""WebQuestions: questions with short answers, any of which is right."""

import re
import string
from functools import partial

from jobs.evaluate import few_shot

PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain(answer: str) -> str:
    """Lower case, without punctuation, articles and spaces too many."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(PUNCTUATION)).split())


WEBQUESTIONS = few_shot.QuestionSet(
    name="webquestions",
    answer_is="Answer",
    questions=("question",),
    answers=("answers",),
    plain=plain,
    classes=False,
)
check = partial(few_shot.check_files, WEBQUESTIONS)
cells = partial(few_shot.cells, WEBQUESTIONS)
summarize = partial(few_shot.summarize, WEBQUESTIONS)
