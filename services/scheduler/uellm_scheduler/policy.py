"""Which policy is in force for a model: what was chosen while running, else the service's."""

from uellm import logs
from uellm.core.errors import InvalidArgumentError
from uellm.policy.choice import PolicyChoice
from uellm.policy.registry import dispatch_policy
from uellm.policy.views import DispatchPolicy
from uellm.v1 import common_pb2
from uellm_scheduler.settings import SchedulerSettings

_log = logs.logger("policy")


def choice_of(record: common_pb2.ModelPolicy) -> PolicyChoice:
    """A record as plain data."""
    return PolicyChoice(record.policy, dict(record.settings), record.execution)


class PolicyInForce:
    """The policy of one model.

    Args:
        settings: the service's.

    Attributes:
        policy: decides.
        choice: what it was made of.
        record: what was chosen for the model; None: nothing was.
    """

    def __init__(self, settings: SchedulerSettings) -> None:
        self._settings = settings
        self.record: common_pb2.ModelPolicy | None = None
        self.choice = PolicyChoice(settings.policy)
        self.policy: DispatchPolicy = dispatch_policy(settings.policy, settings.dispatch_settings)

    def follow(self, record: common_pb2.ModelPolicy | None) -> None:
        """Take on what was chosen.

        One that this scheduler cannot make leaves the present one in force, and is logged once.
        """
        if record == self.record:
            return
        self.record = record
        default = PolicyChoice(self._settings.policy)
        choice = default if record is None else choice_of(record)
        try:
            policy = choice.dispatch(self._settings.dispatch_settings)
        except InvalidArgumentError as error:
            _log.warning("keeping the policy", policy=self.policy.name, error=error.message)
            return
        if policy is None:
            # Only engines have one of that name, or another scheduler's packages.
            choice, policy = default, default.dispatch(self._settings.dispatch_settings)
        if policy is not None:
            self.choice, self.policy = choice, policy
