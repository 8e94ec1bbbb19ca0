// The token, for a service that requires one. It is stored for this tab only.

const STORAGE_KEY = "actserve token";
let token = sessionStorage.getItem(STORAGE_KEY);

export function keep(value) {
  token = value;
  sessionStorage.setItem(STORAGE_KEY, value);
}

export const headers = () => (token ? { Authorization: `Bearer ${token}` } : {});

// Browsers cannot set headers on a WebSocket, so the token goes into the subprotocols.
export const protocols = () => (token ? ["actserve", `bearer.${token}`] : []);
