"""Settings of evaluations and the outputs of a job that they change; see test_wiring.py."""

COME = ("merge=come",)
TASKS, NLL = {"dense tasks", "merged tasks"}, {"dense nll", "merged nll"}
ANSWERS = {"dense answers", "merged answers"}
AGREEMENT = {"dense agreement", "merged agreement"}

SPEED = (*COME, "eval=[perplexity,speed]")
CONTINUATIONS = ("merge=come", "eval=[perplexity,continuations]", "eval.continuations.tokens=3")
ZERO_SHOT = (
    "merge=come", "eval=[perplexity,zero_shot]",
    "eval.zero_shot.include_path={tasks}", "eval.zero_shot.tasks=[a]",
)  # fmt: skip
GENERATION = (
    "merge=come", "eval=[perplexity,generation]",
    "eval.generation.include_path={tasks}", "eval.generation.tasks=[a]",
)  # fmt: skip
AGREES = (
    "merge=come", "eval=[perplexity,agreement]", "eval.agreement.seq_len=24",
    "eval.agreement.prompt_tokens=8", "eval.agreement.new_tokens=5",
    "eval.agreement.max_tokens=120", "eval.agreement.path={third}",
)  # fmt: skip

# (job, changed setting, outputs that change)
EVALUATION_CHANGES = [
    (COME, "eval.perplexity.path={third}", {*NLL, "eval text"}),
    (COME, "eval.perplexity.max_tokens=256", NLL),
    (COME, "eval.perplexity.text_range=[0.5,1]", NLL),
    (COME, "eval.perplexity.seq_len=16", NLL),
    (COME, "eval=continuations eval.continuations.tokens=3", {*NLL, "eval text", "continuations"}),
    (COME, "+eval.perplexity.extra_texts={a:{path:{third},max_tokens:128}}", {"also"}),
    ((*COME, "+eval.perplexity.extra_texts={a:{path:{third},max_tokens:128}}"),
     "eval.perplexity.extra_texts.a.max_tokens=256", {"also"}),
    ((*COME, "+eval.perplexity.extra_texts={a:{path:{third},max_tokens:128}}"),
     "+eval.perplexity.extra_texts.a.text_range=[0.5,1]", {"also"}),
    (COME, "eval=[perplexity,continuations] eval.continuations.tokens=3", {"continuations"}),
    (CONTINUATIONS, "eval.continuations.tokens=4", {"continuations"}),
    (CONTINUATIONS, "eval.continuations.prompts=[a]", {"continuations"}),
    (COME, "eval=[perplexity,speed]", {"speed", "prompt_tokens", "new_tokens", "batch", "repeats"}),
    (SPEED, "eval.speed.prompt_tokens=20", {"prompt_tokens"}),
    (SPEED, "eval.speed.new_tokens=7", {"new_tokens"}),
    (SPEED, "eval.speed.batch_size=2", {"batch"}),
    (SPEED, "eval.speed.repeats=2", {"repeats"}),
    (COME, " ".join(ZERO_SHOT[1:]), TASKS),
    (ZERO_SHOT, "eval.zero_shot.tasks=[a,b]", TASKS),
    (ZERO_SHOT, "eval.zero_shot.limit=5", TASKS),
    (ZERO_SHOT, "eval.zero_shot.include_path={tasks2}", TASKS),
    (COME, " ".join(GENERATION[1:]), ANSWERS),
    (GENERATION, "eval.generation.tasks=[a,b]", ANSWERS),
    (GENERATION, "eval.generation.limit=5", ANSWERS),
    (GENERATION, "eval.generation.include_path={tasks2}", ANSWERS),
    (COME, " ".join(AGREES[1:]), AGREEMENT),
    (AGREES, "eval.agreement.seq_len=20", AGREEMENT),
    (AGREES, "eval.agreement.prompt_tokens=9", AGREEMENT),
    (AGREES, "eval.agreement.new_tokens=6", AGREEMENT),
    (AGREES, "eval.agreement.max_tokens=72", AGREEMENT),
    (AGREES, "eval.agreement.path={other}", AGREEMENT),
    (AGREES, "eval.agreement.text_range=[0.5,1]", AGREEMENT),
]  # fmt: skip
_SOURCES = ("source", "dataset", "subset", "split", "revision", "field", "data_files")
EVALUATION_ELSEWHERE = {
    "eval.perplexity.batch_tokens", "eval.zero_shot.batch_size", "eval.generation.batch_size",
    "eval.agreement.batch_size",
    *(f"eval.{text}.{key}" for text in ("perplexity", "agreement") for key in _SOURCES),
}  # fmt: skip
