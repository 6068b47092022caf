"""What `transfer` does with first weights and labels: one entry each in `ESTIMATORS`, beside fine-tuning."""
