"""From queued bins to answers: policy, engines, model slots."""
