"""A reward server as V-Triune's: FastAPI, one completion per request, judged in the handler.

python benchmarks/plain_server.py PORT WORKERS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

from benchmarks import plain_detection

TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
GOLD = (LatexExtractionConfig(), ExprExtractionConfig())
PREDICTION = (LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),)


class Question(BaseModel):
    response: str
    prompt: str
    answer: str
    solution: str
    data_source: str
    reward_verifier: str
    reward_verifier_parm: str
    format_ratio: float = 0.1
    accuracy_ratio: float = 1.0


app = FastAPI()


@app.get("/")
async def root():
    return {"message": "Reward Judge Server"}


@app.post("/judge")
async def judge(question: Question):
    params = json.loads(question.reward_verifier_parm)
    ratios = question.accuracy_ratio, question.format_ratio
    if question.reward_verifier == "detection":
        progress = params["step"] / params["total_steps"]
        parts = plain_detection.score(question.response, question.solution, progress, ratios)
    else:
        gold = parse(question.solution, GOLD, extraction_mode="first_match")
        found = parse(question.response, PREDICTION, extraction_mode="first_match")
        parts = {"accuracy": float(verify(gold, found))}
        parts["format"] = sum(question.response.count(tag) == 1 for tag in TAGS) / len(TAGS)
        parts["final"] = parts["accuracy"] * ratios[0] + parts["format"] * ratios[1]
        parts["final"] /= sum(ratios)
    return {"rewards": {f"{name}_reward": value for name, value in parts.items()}}


if __name__ == "__main__":
    uvicorn.run(
        "benchmarks.plain_server:app",
        port=int(sys.argv[1]),
        workers=int(sys.argv[2]),
        log_level="warning",
        access_log=False,
        app_dir=str(Path(__file__).resolve().parents[1]),
    )
