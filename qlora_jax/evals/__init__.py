"""How good a model is: perplexity of a text, MMLU, tournaments of judged answers."""

from qlora_jax.evals.elo import Match as Match
from qlora_jax.evals.elo import Rating as Rating
from qlora_jax.evals.elo import elo_ratings as elo_ratings
from qlora_jax.evals.elo import read_matches as read_matches
from qlora_jax.evals.mmlu import MmluResult as MmluResult
from qlora_jax.evals.mmlu import Question as Question
from qlora_jax.evals.mmlu import mmlu as mmlu
from qlora_jax.evals.mmlu import read_questions as read_questions
from qlora_jax.evals.perplexity import Perplexity as Perplexity
from qlora_jax.evals.perplexity import perplexity as perplexity
from qlora_jax.evals.perplexity import read_text as read_text
from qlora_jax.evals.scoring import log_probs as log_probs
from qlora_jax.evals.scoring import next_log_probs as next_log_probs
