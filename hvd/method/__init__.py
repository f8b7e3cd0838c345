"""The method's pure functions (METHOD): objectives of the value stage, weights and losses of the policy stage."""
