"""The loss, the train step, and the loop around it."""

from qlora_jax.sharding import committed as committed
from qlora_jax.train.config import TrainConfig as TrainConfig
from qlora_jax.train.config import check_same_run as check_same_run
from qlora_jax.train.config import may_change as may_change
from qlora_jax.train.evaluate import evaluate as evaluate
from qlora_jax.train.loop import fit as fit
from qlora_jax.train.loss import next_token_loss as next_token_loss
from qlora_jax.train.loss import next_token_loss_sum as next_token_loss_sum
from qlora_jax.train.neftune import neftune as neftune
from qlora_jax.train.progress import NonfiniteError as NonfiniteError
from qlora_jax.train.step import make_train_step as make_train_step
from qlora_jax.train.step import step_options as step_options
from qlora_jax.train.stop import Stopped as Stopped
