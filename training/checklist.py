"""Reporting checklists, CLAIM (2024 update) and TRIPOD+AI (2024), filled with what a run knows; the rest stays visibly
blank for the authors. The numbers are the guidelines'; the wording of what each item asks is ours.

Sources: Tejani et al., "Checklist for Artificial Intelligence in Medical Imaging (CLAIM): 2024 Update", Radiology: AI
2024; Collins et al., "TRIPOD+AI statement", BMJ 2024;385:e078378.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from training import report

BLANK = report.Blank("to be filled by the authors")


@dataclass(frozen=True)
class Item:
    number: str
    part: str
    """The guideline's heading that it stands under."""
    asks: str
    facts: tuple[str, ...] = ()
    """Which of `FACTS` answer it; several are joined. None: no run can know."""


FACTS = {
    "category": "what kind of method it is",
    "goal": "what the model was to tell apart",
    "design": "how the evaluation was made",
    "source": "which data set, in which version",
    "excluded": "which images were left out, and why",
    "preprocessing": "what was done to the pixels",
    "subset": "which rows of the data set were used",
    "missing": "what became of missing labels, groups and unreadable images",
    "copies": "what became of copies",
    "classes": "the classes and how many images each has",
    "partitions": "how images were assigned to training and test",
    "disjoint": "what no two partitions share",
    "size": "how many images and groups there are",
    "model": "the network, its input and its output",
    "versions": "versions of software",
    "initial": "where the first weights came from",
    "training": "how it was trained",
    "selection": "how the final model was chosen",
    "ensembles": "whether several models answer together",
    "imbalance": "what was done about rare classes",
    "metrics": "which metrics",
    "uncertainty": "how intervals were made",
    "results": "the values, with their intervals",
    "guessing": "what guessing reaches",
    "calibration": "how probabilities were calibrated, and how well they are",
    "subgroups": "results by subgroup",
    "clusters": "how results differ between folds or sites",
    "explanation": "how the model's attention is shown",
    "failures": "where wrong predictions are shown",
    "internal": "on which internal data it was judged",
    "external": "on which external data it was judged",
    "limits": "known limits",
    "artifact": "where the model is kept, and how it is loaded",
    "unsuited": "what happens to images that cannot be read or are unlike the training set",
}
"""What a run may know, by the names that `Item.facts` uses."""

CLAIM = (
    Item("1", "Title", "The title says that it is a study of AI, and of which kind", ("category",)),
    Item("2", "Abstract", "A summary of design, methods, results and conclusions"),
    Item("3", "Introduction", "The clinical background and the role that the AI is meant to have"),
    Item("4", "Introduction", "Aims and hypotheses"),
    Item("5", "Study design", "Whether data were collected before or after the study was planned"),
    Item("6", "Study design", "What the study is to achieve", ("goal", "design")),
    Item("7", "Data", "Where the data come from", ("source",)),
    Item("8", "Data", "Who and what was included and excluded", ("excluded",)),
    Item("9", "Data", "How images were prepared", ("preprocessing",)),
    Item("10", "Data", "Which part of the data was used", ("subset",)),
    Item("11", "Data", "How patients were made anonymous"),
    Item("12", "Data", "What was done about missing data", ("missing",)),
    Item("13", "Data", "How images were acquired: devices and settings"),
    Item("14", "Reference standard", "How the truth was defined", ("classes",)),
    Item("15", "Reference standard", "Why this reference standard"),
    Item("16", "Reference standard", "Who labelled the images, and with which qualification"),
    Item("17", "Reference standard", "How the test set was labelled"),
    Item("18", "Reference standard", "How far those who labelled agree, with each other and with themselves"),
    Item("19", "Data partitions", "How data were assigned to partitions", ("partitions",)),
    Item(
        "20", "Data partitions", "At which level partitions are apart (patient, study, image)", ("disjoint", "copies")
    ),
    Item("21", "Test data", "The intended sample size, and how it was determined"),
    Item("22", "Model", "The model in enough detail to build it again", ("model",)),
    Item("23", "Model", "Software, with versions", ("versions",)),
    Item("24", "Model", "How parameters were initialised", ("initial",)),
    Item("25", "Training", "How it was trained: augmentation, hyperparameters, number of models", ("training",)),
    Item("26", "Training", "How the final model was chosen", ("selection",)),
    Item("27", "Training", "Ensembles", ("ensembles",)),
    Item("28", "Evaluation", "Which metrics, and why these", ("metrics",)),
    Item("29", "Evaluation", "How significance and uncertainty were measured", ("uncertainty",)),
    Item("30", "Evaluation", "Analyses of robustness or sensitivity"),
    Item("31", "Evaluation", "Methods of explanation, and how they were validated", ("explanation",)),
    Item("32", "Evaluation", "Evaluation on internal data", ("internal",)),
    Item("33", "Evaluation", "Test on external data", ("external",)),
    Item("34", "Evaluation", "Registration of a clinical trial"),
    Item("35", "Results: data", "Numbers of patients or examinations, included and excluded", ("size", "excluded")),
    Item("36", "Results: data", "Demographic and clinical characteristics of each partition"),
    Item("37", "Results: performance", "Performance, with its uncertainty", ("results", "guessing")),
    Item("38", "Results: performance", "Diagnostic accuracy and its precision", ("calibration",)),
    Item("39", "Results: performance", "An analysis of wrong results", ("failures",)),
    Item("40", "Discussion", "Limitations", ("limits",)),
    Item("41", "Discussion", "What it means for practice"),
    Item("42", "Other information", "Where the full protocol is"),
    Item("43", "Other information", "Whether software, model and data are available", ("artifact",)),
    Item("44", "Other information", "Funding, and the role of those who fund"),
)

TRIPOD_AI = (
    Item("1", "Title", "The title names the model, the population and the outcome", ("goal",)),
    Item("2", "Abstract", "An abstract by the guideline's own list for abstracts"),
    Item("3a", "Introduction", "The health care context, and models that exist already"),
    Item("3b", "Introduction", "For whom, for what purpose, and for which users the model is meant"),
    Item("3c", "Introduction", "Known health inequalities between groups of people"),
    Item("4", "Introduction", "Objectives: development, evaluation, or both", ("goal",)),
    Item("5a", "Data", "Sources of the data, and whether they represent the target population", ("source",)),
    Item("5b", "Data", "From when to when data were collected"),
    Item("6a", "Participants", "Setting; number and location of centres"),
    Item("6b", "Participants", "Who was eligible", ("excluded",)),
    Item("6c", "Participants", "Treatments that participants received"),
    Item("7", "Data preparation", "Preparation and quality checks of the data", ("preprocessing", "copies")),
    Item("8a", "Outcome", "What is predicted, and how it was determined", ("classes",)),
    Item("8b", "Outcome", "Qualification of those who determined it"),
    Item("8c", "Outcome", "Whether they were blinded"),
    Item("9a", "Predictors", "Which predictors were chosen, and why", ("preprocessing",)),
    Item("9b", "Predictors", "How and when predictors were measured"),
    Item("9c", "Predictors", "Qualification of those who measured subjective predictors"),
    Item("10", "Sample size", "How the sample size was arrived at", ("size",)),
    Item("11", "Missing data", "What was done about missing data", ("missing",)),
    Item("12a", "Analysis", "How data were used, and parted into training and evaluation", ("partitions", "disjoint")),
    Item("12b", "Analysis", "How predictors entered the model", ("model",)),
    Item(
        "12c", "Analysis", "Type of model, how it was built and tuned, internal validation", ("training", "selection")
    ),
    Item("12d", "Analysis", "How differences between clusters (sites, countries) were handled"),
    Item("12e", "Analysis", "Measures and plots of performance", ("metrics", "uncertainty")),
    Item("12f", "Analysis", "Updating of the model"),
    Item("12g", "Analysis", "How predictions were made for evaluation", ("internal",)),
    Item("13", "Class imbalance", "What was done about rare classes, and its effect on calibration", ("imbalance",)),
    Item("14", "Fairness", "What was done for fairness between groups of people"),
    Item("15", "Model output", "What the model puts out; thresholds and how they were chosen", ("calibration",)),
    Item("16", "Training and evaluation", "How evaluation data differ from training data", ("external",)),
    Item("17", "Ethics", "Ethical approval and consent"),
    Item("18a", "Open science", "Funding"),
    Item("18b", "Open science", "Conflicts of interest"),
    Item("18c", "Open science", "Where the protocol is"),
    Item("18d", "Open science", "Registration"),
    Item("18e", "Open science", "Whether data are available"),
    Item("18f", "Open science", "Whether code is available"),
    Item("19", "Involvement", "How patients and the public were involved"),
    Item("20a", "Results: participants", "The flow of participants and images", ("size", "excluded")),
    Item("20b", "Results: participants", "Characteristics of the participants"),
    Item("20c", "Results: participants", "Comparison of evaluation with development data"),
    Item("21", "Results: development", "Numbers of participants and outcomes in each analysis", ("classes",)),
    Item("22", "Results: specification", "The whole model, so that others can use it", ("artifact",)),
    Item("23a", "Results: performance", "Performance with intervals, also by subgroup", ("results", "subgroups")),
    Item("23b", "Results: performance", "Differences of performance between clusters", ("clusters",)),
    Item("24", "Results: updating", "Results of updating the model"),
    Item("25", "Discussion", "What the results mean, also for fairness"),
    Item("26", "Discussion", "Limitations", ("limits",)),
    Item("27a", "Usability", "What happens to poor or unavailable input", ("unsuited",)),
    Item("27b", "Usability", "What users must do, and what they must know"),
    Item("27c", "Usability", "Next steps of research"),
)

LISTS = {"CLAIM, update of 2024": CLAIM, "TRIPOD+AI, 2024": TRIPOD_AI}


def checklist_section(facts: Mapping[str, str]) -> report.Section:
    """Every item of both checklists, in order: answered where one of its facts is there, else marked as blank.

    Raises:
        ValueError: a fact has a name that is not in `FACTS`.
    """
    strange = sorted(set(facts) - set(FACTS))
    if strange:
        raise ValueError(f"facts {', '.join(strange)}: no such fact; see training.checklist.FACTS")
    known = {name: text for name, text in facts.items() if text}
    total = sum(len(items) for items in LISTS.values())
    filled = sum(any(name in known for name in item.facts) for items in LISTS.values() for item in items)
    blocks: list[report.Block] = [
        report.Text(
            f"What journals ask of a study like this one, {total} items of two checklists. The run knows an answer, or "
            f"part of one, to {filled}; the other {total - filled} are for the authors. The wording of the items is a "
            "summary: before submitting, read the guidelines themselves."
        )
    ]
    blocks += [_table(name, items, known) for name, items in LISTS.items()]
    return report.Section("Checklist", blocks)


def _table(name: str, items: tuple[Item, ...], known: Mapping[str, str]) -> report.Table:
    rows: list[list[report.Cell]] = []
    for item in items:
        answers = [known[fact] for fact in item.facts if fact in known]
        rows.append([item.number, item.part, item.asks, f"Reported: {' '.join(answers)}" if answers else BLANK])
    return report.Table(["Item", "Part", "What it asks", "Answer"], rows, name)
