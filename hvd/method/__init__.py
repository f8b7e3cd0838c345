"""The method (docs/method.md): objectives of the value stage, weights and losses of the policy stage."""
