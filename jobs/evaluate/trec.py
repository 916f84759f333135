"""TREC: which of 50 fine classes is a question's answer of?"""

from functools import partial

from jobs.evaluate import few_shot

TREC = few_shot.QuestionSet(
    name="trec",
    answer_is="Type",
    questions=("question", "text"),
    answers=("fine", "fine_label", "label-fine"),
    plain=str.strip,
    classes=True,
)
check = partial(few_shot.check_files, TREC)
cells = partial(few_shot.cells, TREC)
summarize = partial(few_shot.summarize, TREC)
