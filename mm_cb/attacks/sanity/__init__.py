"""The sanity battery: is a low number the model's strength or the attack's weakness?"""
