"""What featxfer takes without harm: faults, hostile files, odd numbers, and the same bits again."""
