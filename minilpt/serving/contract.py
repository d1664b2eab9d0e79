"""What goes over the wire: requests, answers and errors of text-embeddings-inference, and of our own /explain.

The contract is that of the router of huggingface/text-embeddings-inference (router/src/http/types.rs and server.rs).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ErrorBody(BaseModel):
    error: str
    error_type: str


class Cut(BaseModel):
    truncate: bool | None = Field(None, description="cut texts that are too long; null: as the server is set")
    truncation_direction: Literal["right", "Right", "left", "Left", None] = Field(
        None, description="the end that is cut; null: as the model's tokenizer has it"
    )


class PredictRequest(Cut):
    inputs: str | list[str] | list[list[str]] = Field(
        description="a text; a pair [a, b]; or a batch of texts and pairs, each in a list: [[a], [b, c]]",
        examples=["a gorgeous , witty , seductive movie ."],
    )
    raw_scores: bool = Field(False, description="the model's plain outputs instead of probabilities")


class RerankRequest(Cut):
    query: str
    texts: list[str]
    raw_scores: bool = Field(False, description="the model's plain outputs instead of their sigmoids")
    return_text: bool = False


class EmbedRequest(Cut):
    inputs: str | list[str]
    normalize: bool = True


class TokenizeRequest(BaseModel):
    inputs: str | list[str]
    add_special_tokens: bool = True


class ExplainRequest(BaseModel):
    text: str
    pair: str | None = None


class Label(BaseModel):
    score: float
    label: str


class Rank(BaseModel):
    index: int
    text: str | None = Field(None, description="with return_text only")
    score: float


class TokenOfText(BaseModel):
    id: int
    text: str
    special: bool
    start: int | None = Field(description="first character; null for special tokens")
    stop: int | None


class Fate(BaseModel):
    token: str
    part: int | None = Field(description="0: of the text, 1: of the pair's second, null: a special token")
    start: int
    end: int
    scores: list[float] = Field(description="of each layer that it reached: the attention received; 1 is the mean")
    removed_in: int | None = Field(description="the layer, from 0; null: it stayed to the end")


class Explained(BaseModel):
    label: str
    score: float
    scores: dict[str, float]
    tokens: list[Fate]
    layers: int
    rule: str | None = Field(description="the keep rule; null: no pruning")
    flops_ratio: float = Field(description="executed FLOPs over those of the unpruned model")


class Info(BaseModel):
    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: dict[str, dict[str, dict[str, str | int] | str | None]]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None
