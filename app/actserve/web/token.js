// The token, where the service wants one. It stays in this tab.

const KEPT = "actserve token";
let token = sessionStorage.getItem(KEPT);

export function keep(value) {
  token = value;
  sessionStorage.setItem(KEPT, value);
}

export const headers = () => (token ? { Authorization: `Bearer ${token}` } : {});

// A browser sends no header of ours with a WebSocket.
export const protocols = () => (token ? ["actserve", `bearer.${token}`] : []);
