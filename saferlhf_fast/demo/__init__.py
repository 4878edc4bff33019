"""The whole loop on an embedded world, checked by gold scores: no data, no network, minutes on two cores."""
