"""The gates tested by mutation: known defects are put into this very model, and the gates must see them."""

from stages.validate.self_test.run import SelfTest, run_self_test, self_test_gates, self_test_notes

__all__ = ["SelfTest", "run_self_test", "self_test_gates", "self_test_notes"]
